// The version of the program.
#pragma once

namespace rwkv {

// As in CMakeLists.txt, "0.1.0".
const char* rookery_version();

}  // namespace rwkv
