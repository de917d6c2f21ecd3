#include "cpu/kernel.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <vector>

// Older torches have no such kernels, and on other processors than x86 plain products stand in for them.
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__) && \
    defined(__GNUC__)
#define FLEXLORA_BRGEMM 1
#endif

namespace flexlora::cpu {

#ifdef FLEXLORA_BRGEMM
template <>
void multiply(int64_t height, int64_t width, int64_t depth, const float* A, int64_t ld, const float* B, float* C,
              bool add) {
    at::native::cpublas::brgemm(height, width, depth, ld, kBlock, kBlock, add, A, B, C, false);
}

template <>
void multiply(int64_t height, int64_t width, int64_t depth, const uint16_t* A, int64_t ld, const uint16_t* B, float* C,
              bool add) {
    at::native::cpublas::brgemm(height, width, ceil_to(depth, 2), ld, kBlock, kBlock, add,
                                reinterpret_cast<const at::BFloat16*>(A), reinterpret_cast<const at::BFloat16*>(B), C,
                                true);
}

template <>
void release<float>() {
    at::native::cpublas::brgemm_release(false);
}

template <>
void release<uint16_t>() {
    at::native::cpublas::brgemm_release(true);
}

namespace {

// The smallest product of ones, compared with what must come out; what torch says where it does not.
template <typename T>
std::string probe(T one) {
    try {
        const std::vector<T> A(16 * kDepth, one), B(16 * kBlock, one);
        std::vector<float> C(16 * kBlock, 0.0f);
        multiply<T>(16, 16, 16, A.data(), kDepth, B.data(), C.data(), false);
        release<T>();
        return C[0] == 16.0f ? "" : "torch's block kernels give wrong products";
    } catch (const c10::Error& error) {
        return std::string("torch's block kernels fail: ") + error.what_without_backtrace();
    }
}

std::string switched_off() {
    const bool on = at::globalContext().userEnabledMkldnn();
    return on ? "" : "oneDNN is switched off (torch.backends.mkldnn)";
}

}  // namespace

template <>
std::string obstacle<float>() {
    if (!switched_off().empty()) return switched_off();
    static const std::string found =
        __builtin_cpu_supports("avx2") ? probe<float>(1.0f) : "this CPU has no AVX2 instructions";
    return found;
}

template <>
std::string obstacle<uint16_t>() {
    if (!switched_off().empty()) return switched_off();
    // Without the instructions, products in bfloat16 would be emulated: slower than in float32.
    static const std::string found =
        __builtin_cpu_supports("avx512bf16") ? probe<uint16_t>(0x3f80) : "this CPU has no AVX512-BF16 instructions";
    return found;
}
#else
namespace {

const char* const kAbsent =
    "the extension was built without block kernels: they need an x86-64 CPU and a torch that exports them";

}  // namespace

template <>
std::string obstacle<float>() {
    return kAbsent;
}

template <>
std::string obstacle<uint16_t>() {
    return kAbsent;
}

template <>
void multiply(int64_t, int64_t, int64_t, const float*, int64_t, const float*, float*, bool) {}

template <>
void multiply(int64_t, int64_t, int64_t, const uint16_t*, int64_t, const uint16_t*, float*, bool) {}

template <>
void release<float>() {}

template <>
void release<uint16_t>() {}
#endif

}  // namespace flexlora::cpu
