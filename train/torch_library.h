// Loads librookery_torch.so, which holds the commands that need LibTorch.
#pragma once

#include <string>

namespace rwkv {

// Where the library is expected: ../lib beside the folder of the program.
std::string torch_library_path();

// Loads the library on first use and runs a command of it. Throws std::runtime_error naming the
// library if it cannot be loaded; else as the command does.
int run_torch_command(const char* name, int argc, char** argv, bool verbose);

// The version of LibTorch that the library was built with, "2.11.0". Loads it, and throws as above.
std::string libtorch_version();

}  // namespace rwkv
