// What a program says when a mapped file becomes shorter than its mapping. Reading the lost part
// raises SIGBUS, which ends a program without a word; here it ends with a message and the exit code
// of a failed run. Where the end of the file lies inside a page, the rest of that page reads as
// zeros, and nobody is told.
#pragma once

#include <cstddef>
#include <string>

namespace rwkv {

// From now on, a SIGBUS inside a mapping of MappedFile writes one line to stderr, which names the
// file and both sizes, and ends the program at once with exit code 1. Any other SIGBUS does what it
// did before. For the whole process; once is enough, more does no harm.
void report_shrunk_mappings();

// Called by MappedFile for each of its mappings. Up to 1,024 are remembered at once; of one beyond
// them nothing is said. Safe from several threads.
void remember_mapping(const std::byte* data, size_t size, const std::string& path);
void forget_mapping(const std::byte* data);

}  // namespace rwkv
