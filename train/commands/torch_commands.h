// The commands that need LibTorch, in a library of their own: loading LibTorch takes ten times as
// long as all else that `rookery --help` or `rookery report` does.
#pragma once

// Entry of librookery_torch.so: runs the command `name` ("train") with its arguments and returns
// its exit code. Throws what train/run_main.h knows. With `verbose`, texts of LibTorch's errors
// keep their backtrace.
extern "C" int rookery_run_torch_command(const char* name, int argc, char** argv, bool verbose);
// The version of LibTorch that the library was built with.
extern "C" const char* rookery_libtorch_version();
