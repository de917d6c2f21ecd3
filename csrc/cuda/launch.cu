#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <mutex>
#include <sstream>
#include <stdexcept>

namespace flexlora::cuda {
namespace {

// What a block may have of dynamic shared memory without asking for more.
constexpr std::size_t granted_bytes = 48 * 1024;

std::string words(cudaError_t error) {
    return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The calling thread's device, put back at the end of the scope.
class OnDevice {
public:
    explicit OnDevice(int device) : status_(cudaGetDevice(&before_)) {
        if (status_ == cudaSuccess && before_ != device) {
            status_ = cudaSetDevice(device);
            changed_ = status_ == cudaSuccess;
        }
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    cudaError_t status() const { return status_; }

private:
    int before_ = 0;
    bool changed_ = false;
    cudaError_t status_;
};

cudaError_t start(const Kernel& kernel, const Extent& grid, const Extent& block, std::size_t shared_bytes,
                  cudaStream_t stream, std::vector<Slot>& values) {
    // What is allowed belongs to the function: another thread's launch may not lower it between here and this one's.
    static std::mutex allowing;
    std::unique_lock<std::mutex> alone(allowing, std::defer_lock);
    if (shared_bytes > granted_bytes) {
        alone.lock();
        const cudaError_t status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared_bytes));
        if (status != cudaSuccess) return status;
    }
    std::vector<void*> addresses;
    for (Slot& value : values) addresses.push_back(&value);
    return cudaLaunchKernel(kernel.function, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                            addresses.data(), shared_bytes, stream);
}

std::ostream& operator<<(std::ostream& out, const Extent& extent) {
    return out << "(" << extent[0] << ", " << extent[1] << ", " << extent[2] << ")";
}

}  // namespace

void launch(const std::string& name, const Extent& grid, const Extent& block, std::size_t shared_bytes, int device,
            void* stream, const std::vector<Argument>& arguments) {
    const Kernel& kernel = find(kernels(), name);
    std::vector<Slot> values = slots(name, kernel, arguments);
    const OnDevice on_device(device);
    cudaError_t status = on_device.status();
    if (status == cudaSuccess) {
        status = start(kernel, grid, block, shared_bytes, static_cast<cudaStream_t>(stream), values);
    }
    const cudaError_t pending = cudaGetLastError();  // also clears it: the next launch must not report this one's
    if (status == cudaSuccess) status = pending;
    if (status == cudaSuccess) return;
    std::ostringstream message;
    message << "kernel '" << name << "' with grid " << grid << ", block " << block << " and " << shared_bytes
            << " bytes of shared memory was refused on cuda:" << device << ": " << words(status);
    throw std::runtime_error(message.str());
}

std::string obstacle(int device) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "no NVIDIA driver is loaded";
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
        return "the NVIDIA driver is for CUDA " + version_text(driver) + " at most and the kernels were built with CUDA " +
               version_text(CUDART_VERSION) + ": update the driver, or rebuild with that CUDA's nvcc";
    }
    if (status == cudaSuccess) {
        const OnDevice on_device(device);
        status = on_device.status();
        // This also loads them all: while a CUDA graph is captured it would be too late.
        for (const auto& [name, kernel] : kernels()) {
            cudaFuncAttributes attributes;
            if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel.function);
        }
    }
    cudaGetLastError();
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
        cudaDeviceProp properties{};
        cudaGetDeviceProperties(&properties, device);
        const std::string present = std::to_string(properties.major) + "." + std::to_string(properties.minor);
        return "they were not built for this GPU: rebuild with TORCH_CUDA_ARCH_LIST=" + present;
    }
    return status == cudaSuccess ? "" : words(status);
}

}  // namespace flexlora::cuda
