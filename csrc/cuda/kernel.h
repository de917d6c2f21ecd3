// A kernel as the launcher knows it, and the check of what it is called with. Nothing here needs CUDA.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

namespace flexlora::cuda {

// The only types a kernel may take, by value or as the address of many, under the names torch has for them.
template <class T>
constexpr const char* type_name = nullptr;
template <>
inline constexpr const char* type_name<double> = "float64";
template <>
inline constexpr const char* type_name<float> = "float32";
template <>
inline constexpr const char* type_name<long long> = "int64";
template <>
inline constexpr const char* type_name<int> = "int32";
template <>
inline constexpr const char* type_name<unsigned char> = "uint8";

template <class T>
std::string parameter() {
    using Value = std::remove_const_t<std::remove_pointer_t<T>>;
    static_assert(type_name<Value> != nullptr, "not a type that a kernel may take");
    return std::string(type_name<Value>) + (std::is_pointer_v<T> ? "*" : "");
}

struct Kernel {
    const void* function;
    std::vector<std::string> parameters;  // "float64", or "float64*" for the address of many
};

using Kernels = std::map<std::string, Kernel>;

// The parameters are read off the function's own type: no list of them can go stale.
template <class... P>
Kernel kernel_of(void (*function)(P...)) {
    return {reinterpret_cast<const void*>(function), {parameter<P>()...}};
}

// A tensor's address and the name of its dtype, or no address and no type. bool fits where uint8 is expected.
struct Address {
    std::uintptr_t value;
    std::string type;
};

// What no kernel takes, and what it is: "a str".
struct Other {
    std::string description;
};

using Argument = std::variant<Address, std::int64_t, double, Other>;

// One argument as the launch wants it: eight bytes of which the kernel reads as many as its parameter has.
union Slot {
    std::uintptr_t address;
    long long int64;
    int int32;
    double float64;
    float float32;
};

// The kernel of that name. Raises std::invalid_argument, quoting the name and those there are.
const Kernel& find(const Kernels& kernels, const std::string& name);

// The arguments in the kernel's own types. Raises std::invalid_argument, quoting kernel, position, what the parameter
// is and what it got, where their number, a type or the size of an integer does not fit.
std::vector<Slot> slots(const std::string& name, const Kernel& kernel, const std::vector<Argument>& arguments);

}  // namespace flexlora::cuda
