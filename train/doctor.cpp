#include "train/doctor.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <dlfcn.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/resource.h>
#include <unistd.h>

#include "data/tokenizer_registry.h"

namespace rwkv {
namespace {

constexpr double kMib = 1024.0 * 1024;
constexpr double kGib = 1024 * kMib;

// LibTorch loaded and a model of a few million parameters with its moments.
constexpr int64_t kLeastMemory = int64_t{512} << 20;
constexpr int64_t kLittleMemory = int64_t{2} << 30;
constexpr int64_t kLittleDisk = int64_t{2} << 30;
constexpr double kSlowDisk = 50 * kMib;
constexpr int64_t kFewFiles = 256;
// A checkpoint of a 169M model: weights and two moments in fp32.
constexpr int64_t kLargeFile = int64_t{2} << 30;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// ---- Looking ------------------------------------------------------------------------------------

bool write_all(int fd, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::write(fd, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno != EINTR) {
      return false;
    }
    done += n < 0 ? 0 : static_cast<size_t>(n);
  }
  return true;
}

void measure_writing(DiskFacts& disk) {
  constexpr int kPieces = 16;
  // Not zeros, which some file systems do not store.
  std::string piece(size_t{4} << 20, '\0');
  for (size_t i = 0; i < piece.size(); ++i) {
    piece[i] = static_cast<char>((i * 2654435761U) >> 13);
  }
  std::string path = (std::filesystem::path(disk.folder) / ".rookery_doctor_XXXXXX").string();
  const int fd = ::mkstemp(path.data());
  if (fd < 0) {
    disk.error = std::strerror(errno);
    return;
  }
  ::unlink(path.c_str());
  const auto begin = std::chrono::steady_clock::now();
  bool is_written = true;
  for (int i = 0; is_written && i < kPieces; ++i) {
    is_written = write_all(fd, piece);
  }
  is_written = is_written && ::fsync(fd) == 0;
  if (is_written) {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    disk.write_bytes_per_s =
        static_cast<double>(piece.size()) * kPieces / std::max(seconds.count(), 1e-9);
  } else {
    disk.is_full = errno == ENOSPC || errno == EDQUOT;
    disk.error = std::strerror(errno);
  }
  ::close(fd);
}

DiskFacts find_disk(const std::string& folder) {
  DiskFacts disk{.folder = folder, .free_bytes = {}, .write_bytes_per_s = {}, .error = ""};
  try {
    disk.folder = std::filesystem::absolute(folder).lexically_normal().string();
    disk.free_bytes = free_disk_bytes(folder);
  } catch (const std::exception&) {
    // What was asked for is then unknown, and writing says why.
  }
  measure_writing(disk);
  return disk;
}

std::string find_vocabulary() {
  try {
    return find_installed_file("rwkv_vocab_v20230424.txt");
  } catch (const std::exception&) {
    return "";
  }
}

// "madvise" of "always [madvise] never".
std::string chosen_huge_pages() {
  const std::string line = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  const size_t begin = line.find('[');
  const size_t end = line.find(']');
  return begin == line.npos || end == line.npos ? "" : line.substr(begin + 1, end - begin - 1);
}

std::optional<int64_t> limit_of(__rlimit_resource resource) {
  rlimit limit{};
  if (::getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return std::nullopt;
  }
  return static_cast<int64_t>(limit.rlim_cur);
}

// ---- Judging ------------------------------------------------------------------------------------

std::string gib(int64_t bytes) {
  return fmt::format("{:.1f} GiB", static_cast<double>(bytes) / kGib);
}

Check examine_processor(const Machine& machine) {
  Check check{.name = "processor", .found = machine.processor, .advice = ""};
  for (const std::string& feature : machine.features) {
    check.found += (&feature == &machine.features.front() ? "; " : ", ") + feature;
  }
  if (!machine.has("avx2")) {
    check.verdict = Verdict::kWarning;
    check.advice =
        "without AVX2 products are several times slower; use a processor made after 2015";
  }
  return check;
}

Check examine_bf16(const Machine& machine) {
  Check check{.name = "bf16", .found = "", .advice = ""};
  if (machine.has("amx_bf16") || machine.has("avx512_bf16")) {
    check.found = "products of bf16 in hardware";
  } else {
    check.found = "no products of bf16 in hardware";
    check.verdict = Verdict::kWarning;
    check.advice = "leave train.dtype at \"fp32\": here bf16 saves memory but is slower";
  }
  return check;
}

Check examine_cores(const Machine& machine) {
  Check check{.name = "cores", .found = std::to_string(machine.cores), .advice = ""};
  if (machine.cpu_quota && *machine.cpu_quota < static_cast<double>(machine.cores)) {
    check.found += fmt::format(", of which this container may use {:.3g}", *machine.cpu_quota);
    check.verdict = Verdict::kWarning;
    check.advice =
        fmt::format("set train.threads = {:.0f}: more threads than that wait for each other",
                    std::max(1.0, std::floor(*machine.cpu_quota)));
  }
  return check;
}

Check examine_memory(const HealthFacts& facts) {
  const int64_t total = facts.machine.memory_bytes;
  // What is free on the machine is no more than what a container may have.
  const int64_t available = std::min(facts.available_memory_bytes.value_or(total), total);
  Check check{
      .name = "memory", .found = gib(total) + ", " + gib(available) + " of it free", .advice = ""};
  if (total == 0) {
    check.found = "unknown";
  } else if (available < kLeastMemory) {
    check.verdict = Verdict::kFatal;
    check.advice =
        "less than 0.5 GiB: end other programs, raise the limit (ulimit -v, the container's, the "
        "job's), or take a larger machine";
  } else if (available < kLittleMemory) {
    check.verdict = Verdict::kWarning;
    check.advice = "enough for small models alone; a smaller train.micro_batch_size needs less";
  }
  return check;
}

Check examine_libtorch(const LibTorchFacts& libtorch) {
  if (libtorch.version.empty()) {
    return {.name = "libtorch",
            .verdict = Verdict::kFatal,
            .found = libtorch.error.empty() ? "not found" : libtorch.error,
            .advice =
                "run scripts/setup.sh and build again, or copy bin and lib of an "
                "installation together"};
  }
  return {.name = "libtorch", .found = libtorch.version + ", " + libtorch.path, .advice = ""};
}

std::vector<std::string> gpu_names(const GpuFacts& gpu) {
  std::vector<std::string> names;
  for (const GpuDevice& device : gpu.devices) {
    names.push_back(device.name);
  }
  return names;
}

Check examine_gpu(const GpuFacts& gpu) {
  Check check{.name = "gpu", .found = "none; training runs on the CPU", .advice = ""};
  if (!gpu.devices.empty()) {
    check.found = "";
    for (const GpuDevice& device : gpu.devices) {
      check.found += fmt::format("{}{} (compute capability {}.{}, {})",
                                 check.found.empty() ? "" : ", ",
                                 device.name,
                                 device.capability_major,
                                 device.capability_minor,
                                 gib(device.memory_bytes));
    }
    check.found += fmt::format(
        "; driver for CUDA {}.{}", gpu.cuda_version / 1000, gpu.cuda_version % 1000 / 10);
    if (const std::string reason = why_not_usable(gpu, 0); !reason.empty()) {
      check.verdict = Verdict::kWarning;
      check.advice = reason;
    }
  } else if (!gpu.kernel_driver.empty() || gpu.has_library) {
    check.found = "a driver (" +
                  (gpu.kernel_driver.empty() ? std::string("libcuda.so.1") : gpu.kernel_driver) +
                  ") but no GPU that can be used; training runs on the CPU";
  }
  return check;
}

Check examine_disk(const DiskFacts& disk) {
  Check check{.name = "disk", .found = disk.folder, .advice = ""};
  if (disk.free_bytes) {
    check.found += ": " + gib(*disk.free_bytes) + " free";
  }
  if (!disk.write_bytes_per_s) {
    check.found += ", cannot be written: " + disk.error;
    check.verdict = Verdict::kWarning;
    check.advice = disk.is_full ? "free some space, or set train.run_dir to another disk"
                                : "set train.run_dir to a folder that can be written";
    return check;
  }
  check.found += fmt::format(", written at {:.0f} MiB/s", *disk.write_bytes_per_s / kMib);
  if (disk.free_bytes && *disk.free_bytes < kLittleDisk) {
    check.verdict = Verdict::kWarning;
    check.advice =
        "little: a checkpoint takes 12 bytes a parameter; set train.run_dir elsewhere, or a "
        "smaller train.keep_checkpoints";
  } else if (*disk.write_bytes_per_s < kSlowDisk) {
    check.verdict = Verdict::kWarning;
    check.advice = "slow: saving stops training for that long; save more rarely, or elsewhere";
  }
  return check;
}

Check examine_vocabulary(const std::string& vocabulary) {
  if (vocabulary.empty()) {
    return {.name = "vocabulary",
            .verdict = Verdict::kWarning,
            .found = "the World vocabulary is not installed",
            .advice = "run scripts/setup.sh, or name a copy as world:FILE; other tokenizers work"};
  }
  return {.name = "vocabulary", .found = vocabulary, .advice = ""};
}

Check examine_huge_pages(const std::string& huge_pages) {
  Check check{
      .name = "huge pages", .found = huge_pages.empty() ? "unknown" : huge_pages, .advice = ""};
  if (huge_pages == "never") {
    check.verdict = Verdict::kWarning;
    check.advice =
        "large tensors lie in pages of 4 KiB; as root: echo madvise > "
        "/sys/kernel/mm/transparent_hugepage/enabled";
  }
  return check;
}

Check examine_limits(const HealthFacts& facts) {
  Check check{.name = "limits",
              .found = facts.open_files_limit == 0
                           ? "open files without a limit"
                           : std::to_string(facts.open_files_limit) + " open files",
              .advice = ""};
  if (facts.file_size_limit) {
    check.found += ", files of up to " + gib(*facts.file_size_limit);
  }
  if (facts.file_size_limit && *facts.file_size_limit < kLargeFile) {
    check.verdict = Verdict::kWarning;
    check.advice = "a checkpoint may grow larger than that: ulimit -f unlimited";
  } else if (facts.open_files_limit > 0 && facts.open_files_limit < kFewFiles) {
    check.verdict = Verdict::kWarning;
    check.advice = "few: ulimit -n 1024";
  }
  return check;
}

const char* name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::kWarning:
      return "warning";
    case Verdict::kFatal:
      return "fatal";
    default:
      return "good";
  }
}

}  // namespace

HealthFacts find_facts(const std::string& folder) {
  return {.machine = describe_machine(),
          .available_memory_bytes = available_memory_bytes(),
          .libtorch = {},
          .gpu = find_gpus(),
          .disk = find_disk(folder),
          .vocabulary = find_vocabulary(),
          .huge_pages = chosen_huge_pages(),
          .open_files_limit = limit_of(RLIMIT_NOFILE).value_or(0),
          .file_size_limit = limit_of(RLIMIT_FSIZE)};
}

std::string loaded_library(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t begin = line.find('/');
    if (begin != line.npos &&
        std::filesystem::path(line.substr(begin)).filename().string().starts_with(name)) {
      return line.substr(begin);
    }
  }
  return "";
}

std::vector<Check> examine(const HealthFacts& facts) {
  return {examine_processor(facts.machine),
          examine_bf16(facts.machine),
          examine_cores(facts.machine),
          examine_memory(facts),
          examine_libtorch(facts.libtorch),
          examine_gpu(facts.gpu),
          examine_disk(facts.disk),
          examine_vocabulary(facts.vocabulary),
          examine_huge_pages(facts.huge_pages),
          examine_limits(facts)};
}

bool can_train(const std::vector<Check>& checks) {
  return std::ranges::none_of(checks,
                              [](const Check& check) { return check.verdict == Verdict::kFatal; });
}

std::string checks_as_text(const std::vector<Check>& checks) {
  std::string text;
  for (const Check& check : checks) {
    text += fmt::format("{:<8} {:<11} {}\n", name_of(check.verdict), check.name, check.found);
    if (!check.advice.empty()) {
      text += fmt::format("{:<20} -> {}\n", "", check.advice);
    }
  }
  return text + (can_train(checks) ? "training can run here\n" : "training cannot run here\n");
}

std::string checks_as_json(const HealthFacts& facts, const std::vector<Check>& checks) {
  nlohmann::ordered_json json = {{"can_train", can_train(checks)},
                                 {"processor", facts.machine.processor},
                                 {"features", facts.machine.features},
                                 {"system", facts.machine.system},
                                 {"cores", facts.machine.cores},
                                 {"memory_bytes", facts.machine.memory_bytes},
                                 {"available_memory_bytes", nullptr},
                                 {"libtorch", facts.libtorch.version},
                                 {"gpus", gpu_names(facts.gpu)},
                                 {"disk_free_bytes", nullptr},
                                 {"disk_write_bytes_per_s", nullptr},
                                 {"checks", nlohmann::ordered_json::array()}};
  const auto add = [&](const char* name, const auto& value) {
    if (value) {
      json[name] = *value;
    }
  };
  add("available_memory_bytes", facts.available_memory_bytes);
  add("disk_free_bytes", facts.disk.free_bytes);
  add("disk_write_bytes_per_s", facts.disk.write_bytes_per_s);
  for (const Check& check : checks) {
    json["checks"].push_back({{"name", check.name},
                              {"verdict", name_of(check.verdict)},
                              {"found", check.found},
                              {"advice", check.advice}});
  }
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace rwkv
