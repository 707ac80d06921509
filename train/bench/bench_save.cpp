#include "train/bench/bench_save.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <span>
#include <stdexcept>

#include <ATen/ATen.h>

#include <fcntl.h>
#include <unistd.h>

#include "data/atomic_file.h"
#include "train/bench/temporary_folder.h"
#include "train/checkpoint.h"

namespace rwkv {
namespace {

constexpr int64_t kTensorElements = int64_t{4} << 20;
constexpr size_t kWriteBytes = size_t{4} << 20;

CheckpointPieces made_up_state(int64_t bytes) {
  CheckpointPieces state;
  const int64_t elements = std::max<int64_t>(bytes / 12, 1);
  for (int64_t begin = 0; begin < elements; begin += kTensorElements) {
    const int64_t size = std::min(kTensorElements, elements - begin);
    const std::string name = "blocks." + std::to_string(begin / kTensorElements) + ".weight";
    const auto piece = [&](const std::string& of) {
      return TensorPiece{
          .name = of, .shape = {size}, .begin = 0, .end = size, .values = at::rand({size})};
    };
    state.weights.push_back(piece(name));
    state.moments.push_back(piece("m." + name));
    state.moments.push_back(piece("v." + name));
  }
  return state;
}

void write_plain(const std::string& path, uint64_t bytes) {
  const std::vector<std::byte> zeros(kWriteBytes);
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  bool is_written = fd >= 0;
  for (uint64_t left = bytes; is_written && left > 0;) {
    const ssize_t n = ::write(fd, zeros.data(), std::min<uint64_t>(left, zeros.size()));
    is_written = n > 0;
    left -= is_written ? static_cast<uint64_t>(n) : 0;
  }
  is_written = is_written && ::fsync(fd) == 0;
  const std::string reason = is_written ? "" : reason_of_failure();
  if (fd >= 0) {
    ::close(fd);
  }
  if (!is_written) {
    throw std::runtime_error(path + ": cannot be written: " + reason);
  }
}

void copy(const std::vector<TensorPiece>& from, std::vector<TensorPiece>& to) {
  for (size_t i = 0; i < from.size(); ++i) {
    std::memcpy(
        to[i].values.mutable_data_ptr(), from[i].values.const_data_ptr(), from[i].values.nbytes());
  }
}

}  // namespace

std::vector<BenchRow> bench_save(const std::string& folder, int64_t bytes, int64_t repeats) {
  const TemporaryFolder own(folder);
  const CheckpointPieces state = made_up_state(bytes);
  CheckpointPieces saved = made_up_state(bytes);
  const auto total = static_cast<double>(bytes_of(state));
  CheckpointSettings settings;
  settings.retention.newest = 1;
  settings.config.train.run_dir = own / "run";

  std::vector<double> plain, save, copying;
  // The first of each finds out where on the disk there is room.
  for (int64_t i = 0; i <= repeats; ++i) {
    const std::string file = own / ("plain" + std::to_string(i)).c_str();
    TrainerState progress;
    progress.step = i + 1;
    double plain_ms = 0, save_ms = 0;
    const double copy_ms = milliseconds_of([&] {
      copy(state.weights, saved.weights);
      copy(state.moments, saved.moments);
    });
    // What was written before may still weigh on the disk: each comes first as often as second.
    for (const bool is_save : {i % 2 == 0, i % 2 != 0}) {
      if (is_save) {
        save_ms = milliseconds_of([&] { save_checkpoint(settings, saved, progress); });
      } else {
        plain_ms = milliseconds_of([&] { write_plain(file, bytes_of(state)); });
        std::filesystem::remove(file);
      }
    }
    if (i > 0) {
      plain.push_back(plain_ms);
      copying.push_back(copy_ms);
      save.push_back(save_ms);
    }
  }
  const auto row = [&](const char* what, std::vector<double> ms, double beside_ms) {
    const Spread spread = spread_of(std::move(ms));
    return BenchRow{.what = what,
                    .ms = spread,
                    .figures = {{"mb_per_s", total / 1e3 / spread.median},
                                {"of_plain", beside_ms / spread.median}}};
  };
  const double plain_ms = spread_of(plain).median;
  return {row("a plain file, fsync", plain, plain_ms),
          row("a checkpoint", save, plain_ms),
          row("the copy of it in memory", copying, plain_ms)};
}

}  // namespace rwkv
