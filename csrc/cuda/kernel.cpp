#include "cuda/kernel.h"

#include <sstream>

#include "cpu/require.h"

namespace flexlora::cuda {
namespace {

std::string described(const Argument& argument) {
    std::ostringstream text;
    if (const auto* address = std::get_if<Address>(&argument)) {
        text << (address->type.empty() ? "None" : "a tensor of " + address->type);
    }
    if (const auto* integer = std::get_if<std::int64_t>(&argument)) text << "the int " << *integer;
    if (const auto* real = std::get_if<double>(&argument)) text << "the float " << *real;
    if (const auto* other = std::get_if<Other>(&argument)) text << other->description;
    return text.str();
}

// Puts the argument into the slot as a parameter of that type; false where it does not fit.
bool fit(const std::string& parameter, const Argument& argument, Slot& slot) {
    if (const auto* address = std::get_if<Address>(&argument)) {
        slot.address = address->value;
        const std::string& type = address->type;
        if (type.empty()) return parameter.back() == '*';
        return parameter == (type == "bool" ? "uint8" : type) + "*";
    }
    if (const auto* integer = std::get_if<std::int64_t>(&argument)) {
        if (parameter == "int64") {
            slot.int64 = *integer;
            return true;
        }
        slot.int32 = static_cast<int>(*integer);
        return parameter == "int32" && slot.int32 == *integer;
    }
    if (const auto* real = std::get_if<double>(&argument)) {
        if (parameter == "float64") {
            slot.float64 = *real;
            return true;
        }
        slot.float32 = static_cast<float>(*real);
        return parameter == "float32";
    }
    return false;
}

std::string joined(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
    return text;
}

}  // namespace

const Kernel& find(const Kernels& kernels, const std::string& name) {
    const auto found = kernels.find(name);
    if (found == kernels.end()) {
        std::vector<std::string> names;
        for (const auto& [other, kernel] : kernels) names.push_back(other);
        require(false, "there is no kernel '", name, "', only ", joined(names));
    }
    return found->second;
}

std::vector<Slot> slots(const std::string& name, const Kernel& kernel, const std::vector<Argument>& arguments) {
    const std::vector<std::string>& parameters = kernel.parameters;
    require(arguments.size() == parameters.size(), "kernel '", name, "' takes ", parameters.size(), " arguments (",
            joined(parameters), "), got ", arguments.size());
    std::vector<Slot> packed(parameters.size(), Slot{0});
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        if (fit(parameters[i], arguments[i], packed[i])) continue;
        require(false, "kernel '", name, "', argument ", i + 1, " of ", parameters.size(), ": expected ", parameters[i],
                ", got ", described(arguments[i]));
    }
    return packed;
}

}  // namespace flexlora::cuda
