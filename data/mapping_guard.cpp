#include "data/mapping_guard.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string_view>

#include <sys/stat.h>
#include <unistd.h>

namespace rwkv {
namespace {

constexpr int kExitFailed = 1;

// The signal's handler may interrupt any code, also code that changes the table: it reads atomics
// and takes no lock.
struct Mapping {
  std::atomic<const std::byte*> data = nullptr;  // none: the slot is free
  std::atomic<size_t> size = 0;
  std::atomic<char*> path = nullptr;
};

std::array<Mapping, 1024> mappings;
std::mutex mappings_mutex;  // held by those who change the table
struct sigaction previous_action;

// A line put together without memory from the heap, which a handler must not ask for.
class Line {
 public:
  Line& add(std::string_view text) {
    const size_t length = std::min(text.size(), text_.size() - length_);
    std::memcpy(text_.data() + length_, text.data(), length);
    length_ += length;
    return *this;
  }
  Line& add(uint64_t number) {
    std::array<char, 20> digits{};
    size_t first = digits.size();
    do {
      digits[--first] = static_cast<char>('0' + number % 10);
      number /= 10;
    } while (number > 0);
    return add(std::string_view(digits.data() + first, digits.size() - first));
  }
  void write_to_stderr() const {
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text_.data(), length_);
  }

 private:
  std::array<char, 5000> text_;  // a path has 4,096 bytes at most
  size_t length_ = 0;
};

const Mapping* find_mapping(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const Mapping& mapping : mappings) {
    const auto begin = reinterpret_cast<uintptr_t>(mapping.data.load());
    if (begin != 0 && at >= begin && at - begin < mapping.size) {
      return &mapping;
    }
  }
  return nullptr;
}

[[noreturn]] void report(const Mapping& mapping) {
  const char* const path = mapping.path;
  const size_t size = mapping.size;
  struct stat status {};
  Line line;
  line.add("rookery: ").add(path);
  if (::stat(path, &status) == 0 && static_cast<uint64_t>(status.st_size) < size) {
    line.add(": became shorter while it was being read: ")
        .add(static_cast<uint64_t>(status.st_size))
        .add(" bytes, but ")
        .add(size)
        .add(
            " when it was opened; was it copied or written again? Put the whole file in its place "
            "and start again\n");
  } else {
    line.add(
        ": could not be read: its disk or network file system failed, or the file was "
        "replaced; see that it is whole and start again\n");
  }
  line.write_to_stderr();
  ::_exit(kExitFailed);
}

void handle_bus_error(int signal, siginfo_t* info, void*) {
  // Positive codes are faults of this thread; others were sent by somebody.
  const Mapping* const mapping = info->si_code > 0 ? find_mapping(info->si_addr) : nullptr;
  if (mapping != nullptr) {
    report(*mapping);
  }
  // A fault comes again when this returns; what was sent must be sent again.
  ::sigaction(signal, &previous_action, nullptr);
  if (info->si_code <= 0) {
    ::raise(signal);
  }
}

}  // namespace

void report_shrunk_mappings() {
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_sigaction = handle_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    return ::sigaction(SIGBUS, &action, &previous_action) == 0;
  }();
  static_cast<void>(installed);
}

void remember_mapping(const std::byte* data, size_t size, const std::string& path) {
  const std::lock_guard lock(mappings_mutex);
  for (Mapping& mapping : mappings) {
    if (mapping.data == nullptr) {
      mapping.path = ::strdup(path.c_str());
      mapping.size = mapping.path != nullptr ? size : 0;
      mapping.data = data;
      return;
    }
  }
}

void forget_mapping(const std::byte* data) {
  const std::lock_guard lock(mappings_mutex);
  for (Mapping& mapping : mappings) {
    if (mapping.data == data) {
      mapping.data = nullptr;
      std::free(mapping.path.exchange(nullptr));
      return;
    }
  }
}

}  // namespace rwkv
