#include "train/machine.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <utility>

#include <sched.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>

namespace rwkv {
namespace {

// Our name of a feature, and that of /proc/cpuinfo.
constexpr std::pair<std::string_view, std::string_view> kFeatures[] = {
    {"avx2", "avx2"},
    {"avx512", "avx512f"},
    {"avx512_bf16", "avx512_bf16"},
    {"amx_bf16", "amx_bf16"},
};

// Empty if it cannot be read: files of /proc and /sys have no size, and cannot be mapped.
std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::optional<int64_t> number_at_start(std::string_view text) {
  int64_t value = 0;
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() ? std::optional(value) : std::nullopt;
}

// The value after "key:" or "key\t:" in lines of such, the first if there are several.
std::string value_of(const std::string& text, std::string_view key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t colon = line.find(':');
    if (colon == line.npos || !line.starts_with(key) ||
        line.find_first_not_of(" \t", key.size()) != colon) {
      continue;
    }
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == line.npos ? "" : line.substr(begin);
  }
  return "";
}

std::optional<int64_t> kib_of(const std::string& text, std::string_view key) {
  const auto kib = number_at_start(value_of(text, key));
  return kib ? std::optional(*kib * 1024) : std::nullopt;
}

std::vector<std::string> features_of(const std::string& cpuinfo) {
  std::istringstream words(value_of(cpuinfo, "flags"));
  const std::vector<std::string> flags{std::istream_iterator<std::string>(words), {}};
  std::vector<std::string> features;
  for (const auto& [ours, theirs] : kFeatures) {
    if (std::ranges::find(flags, theirs) != flags.end()) {
      features.emplace_back(ours);
    }
  }
  return features;
}

int64_t allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

// Folders of the control group of this process and of those above it, down to the root of all.
// Inside a container the group's own path often names no folder, and the root is the container's.
std::vector<std::string> group_folders(const std::string& root) {
  std::filesystem::path group;
  std::istringstream lines(text_of(root + "/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("0::/")) {
      group = line.substr(4);
    }
  }
  std::vector<std::string> folders;
  for (; !group.empty(); group = group.parent_path()) {
    folders.push_back(root + "/sys/fs/cgroup/" + group.string());
  }
  folders.push_back(root + "/sys/fs/cgroup");
  return folders;
}

std::optional<int64_t> memory_limit(const std::string& root) {
  std::optional<int64_t> limit;
  for (const std::string& folder : group_folders(root)) {
    // "max" where there is none.
    const auto bytes = number_at_start(text_of(folder + "/memory.max"));
    if (bytes && (!limit || *bytes < *limit)) {
      limit = bytes;
    }
  }
  if (!limit) {
    limit = number_at_start(text_of(root + "/sys/fs/cgroup/memory/memory.limit_in_bytes"));
  }
  return limit;
}

std::optional<double> cpu_quota(const std::string& root) {
  std::optional<double> quota;
  for (const std::string& folder : group_folders(root)) {
    // Microseconds of use, and of the period in which they may be used: "150000 100000".
    const std::string text = text_of(folder + "/cpu.max");
    const auto used = number_at_start(text);
    const size_t space = text.find(' ');
    const auto period =
        number_at_start(std::string_view(text).substr(std::min(space, text.size())));
    if (used && period && *period > 0) {
      const double cores = static_cast<double>(*used) / static_cast<double>(*period);
      quota = std::min(quota.value_or(cores), cores);
    }
  }
  return quota;
}

std::string system_name() {
  utsname name{};
  return ::uname(&name) == 0 ? std::string(name.sysname) + " " + name.release : "unknown system";
}

}  // namespace

bool Machine::has(std::string_view feature) const {
  return std::ranges::find(features, feature) != features.end();
}

Machine describe_machine(const std::string& root) {
  const std::string cpuinfo = text_of(root + "/proc/cpuinfo");
  const std::string name = value_of(cpuinfo, "model name");
  const int64_t memory = kib_of(text_of(root + "/proc/meminfo"), "MemTotal").value_or(0);
  const int64_t limit = memory_limit(root).value_or(memory);
  return {.processor = name.empty() ? "unknown processor" : name,
          .cores = allowed_cores(),
          .cpu_quota = cpu_quota(root),
          .memory_bytes = memory == 0 ? limit : std::min(memory, limit),
          .features = features_of(cpuinfo),
          .system = system_name()};
}

std::optional<int64_t> available_memory_bytes(const std::string& root) {
  return kib_of(text_of(root + "/proc/meminfo"), "MemAvailable");
}

int64_t resident_bytes() {
  return kib_of(text_of("/proc/self/status"), "VmRSS").value_or(0);
}

int64_t peak_resident_bytes() {
  // Not getrusage's: that starts at what the process had that started this one.
  return kib_of(text_of("/proc/self/status"), "VmHWM").value_or(0);
}

int64_t free_disk_bytes(const std::string& path) {
  std::filesystem::path place = std::filesystem::absolute(path);
  while (!std::filesystem::exists(place) && place.has_relative_path()) {
    place = place.parent_path();
  }
  struct statvfs status {};
  if (::statvfs(place.c_str(), &status) != 0) {
    throw std::runtime_error(path +
                             ": the free space there cannot be read: " + std::strerror(errno));
  }
  return static_cast<int64_t>(status.f_bavail) * static_cast<int64_t>(status.f_frsize);
}

}  // namespace rwkv
