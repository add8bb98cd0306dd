// Lets autograd record graphs of FakeTensors on device cuda where there is no driver: "the current device" is number 0.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
