// Memory of LibTorch's CPU tensors, kept from step to step.
//
// The C library gives large blocks back to the system when they are freed, so that every training
// step would fault all its pages in again, 4 KiB at a time: a quarter of a step. Here freed blocks
// stay, on huge pages where the kernel has them, and a step finds what the step before it left.
#pragma once

#include <cstddef>

namespace rwkv {

// From now on CPU tensors of 64 KiB and more come from kept blocks: the smallest free one that fits
// is cut to size, and freed neighbours join again. Blocks are given back to the system only where
// more must be asked of it, so a repeated step never faults. Smaller tensors stay with the C
// library. An allocation that the system refuses throws c10::OutOfMemoryError with the size asked
// for. Safe to call again; allocations are safe from several threads.
void keep_cpu_memory();

// Bytes in use for the first time so far: the most memory that kept blocks can have pages of.
size_t kept_cpu_memory();

}  // namespace rwkv
