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

// The number after "key " in lines of such: of memory.stat, and of /proc/self/limits.
std::optional<int64_t> number_after(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(key + " ")) {
      return number_at_start(std::string_view(line).substr(key.size()));
    }
  }
  return std::nullopt;
}

// Folders of the control group of this process that limits `controller` ("memory", "cpu") and of
// those above it, up to the root of all. /proc/self/cgroup names it in a line "0::/path", for all
// controllers, or in the older version of groups "4:cpu,cpuacct:/path"; a system may have both.
// Inside a container the group's own path often names no folder, and the root is the container's.
std::vector<std::string> group_folders(const std::string& root, const std::string& controller) {
  std::vector<std::string> folders;
  const auto add = [&](const std::string& top, std::filesystem::path group) {
    for (; !group.empty(); group = group.parent_path()) {
      folders.push_back(top + "/" + group.string());
    }
    folders.push_back(top);
  };
  const std::string top = root + "/sys/fs/cgroup";
  std::filesystem::path group;
  std::filesystem::path older_group;
  std::istringstream lines(text_of(root + "/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const size_t names = line.find(':');
    const size_t path = line.find(":/", std::min(names, line.size()));
    if (path == line.npos) {
      continue;
    }
    const std::string controllers = "," + line.substr(names + 1, path - names - 1) + ",";
    if (line.starts_with("0::/")) {
      group = line.substr(path + 2);
    } else if (controllers.find("," + controller + ",") != line.npos) {
      older_group = line.substr(path + 2);
    }
  }
  add(top, group);
  add(top + "/" + controller, older_group);
  return folders;
}

struct GroupMemory {
  std::optional<int64_t> limit_bytes;  // the least of the limits of all groups
  std::optional<int64_t> free_bytes;   // the least of what limits leave
};

GroupMemory memory_of_groups(const std::string& root) {
  GroupMemory memory;
  const auto lower = [](std::optional<int64_t>& least, int64_t bytes) {
    least = std::min(least.value_or(bytes), bytes);
  };
  for (const std::string& folder : group_folders(root, "memory")) {
    const auto number = [&](const char* file) { return number_at_start(text_of(folder + file)); };
    // "max" where there is none; in the older version a number beyond any memory.
    const auto newer_limit = number("/memory.max");
    const auto limit = newer_limit ? newer_limit : number("/memory.limit_in_bytes");
    if (!limit) {
      continue;
    }
    lower(memory.limit_bytes, *limit);
    const auto used = number(newer_limit ? "/memory.current" : "/memory.usage_in_bytes");
    if (used) {
      // Pages of files that nobody used for long count as used, but give way.
      const auto reclaimable = number_after(text_of(folder + "/memory.stat"),
                                            newer_limit ? "inactive_file" : "total_inactive_file");
      lower(memory.free_bytes, std::max<int64_t>(*limit - (*used - reclaimable.value_or(0)), 0));
    }
  }
  return memory;
}

std::optional<double> cpu_quota(const std::string& root) {
  std::optional<double> quota;
  for (const std::string& folder : group_folders(root, "cpu")) {
    // Microseconds of use, and of the period in which they may be used: "150000 100000"; without a
    // limit "max 100000". The older version has two files, and -1 for no limit.
    const std::string text = text_of(folder + "/cpu.max");
    const size_t space = text.find(' ');
    const auto used = number_at_start(text.empty() ? text_of(folder + "/cpu.cfs_quota_us") : text);
    const auto period = number_at_start(text.empty() ? text_of(folder + "/cpu.cfs_period_us")
                                                     : text.substr(std::min(space, text.size())));
    if (used && *used > 0 && period && *period > 0) {
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
  const int64_t limit = memory_of_groups(root).limit_bytes.value_or(memory);
  return {.processor = name.empty() ? "unknown processor" : name,
          .cores = allowed_cores(),
          .cpu_quota = cpu_quota(root),
          .memory_bytes = memory == 0 ? limit : std::min(memory, limit),
          .features = features_of(cpuinfo),
          .system = system_name()};
}

std::optional<int64_t> available_memory_bytes(const std::string& root) {
  std::optional<int64_t> available = kib_of(text_of(root + "/proc/meminfo"), "MemAvailable");
  const auto lower = [&](std::optional<int64_t> bytes) {
    if (bytes) {
      available = std::min(available.value_or(*bytes), *bytes);
    }
  };
  lower(memory_of_groups(root).free_bytes);
  // ulimit -v: "unlimited" is no number.
  if (const auto limit = number_after(text_of(root + "/proc/self/limits"), "Max address space")) {
    const int64_t used = kib_of(text_of(root + "/proc/self/status"), "VmSize").value_or(0);
    lower(std::max<int64_t>(*limit - used, 0));
  }
  return available;
}

int64_t peak_resident_bytes() {
  // Not getrusage's: that starts at what the process had that started this one.
  return kib_of(text_of("/proc/self/status"), "VmHWM").value_or(0);
}

int64_t anonymous_bytes() {
  return kib_of(text_of("/proc/self/status"), "RssAnon").value_or(0);
}

int64_t peak_anonymous_bytes() {
  // The system keeps no peak of them. It keeps one of all pages, and those of files only grow in
  // number, as code is first used: what they are now is the most that they were at the peak.
  const int64_t files = kib_of(text_of("/proc/self/status"), "RssFile").value_or(0);
  return peak_resident_bytes() - files;
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
