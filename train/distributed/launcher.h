// The launcher: starts the ranks of this machine, hands on what they print and the signals it gets,
// and starts all of them anew when one dies. No Torch.
//
// Each machine has a launcher of its own and none knows of the others. When a rank dies, those of
// other machines lose it too and end, and the launcher there starts them again: every launcher
// counts restarts by itself.
//
// What ranks find in their environment: torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
// MASTER_ADDR and MASTER_PORT (train/distributed/placement.h), ROOKERY_LAUNCHER=1, and
// ROOKERY_RESTART, the number of restarts so far. All else is as the launcher found it,
// OMP_NUM_THREADS too.
//
// Output: each line is printed when it is whole. Rank 0's lines on stdout are printed as they are,
// so that whoever reads what one process prints can read this; other ranks' get "[rank] " before
// them, and so do all lines of stderr, rank 0's too.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rwkv {

struct LaunchPlan {
  std::string program;                      // path of what is started
  std::vector<std::string> arguments;       // its argv, [0] among it
  int64_t ranks_here = 1;                   // ranks on this machine, 1 or more; the same on each
  int64_t num_nodes = 1;                    // machines, 1 or more
  int64_t node_rank = 0;                    // which of them this is, 0 to num_nodes - 1
  std::string master_host = "127.0.0.1";    // where rank 0 listens
  std::optional<int64_t> master_port = {};  // absent: a free one at each start; one machine only
  int64_t max_restarts = 3;                 // 0 or more
  std::string run_dir = {};                 // where checkpoints are; empty: unknown
  std::chrono::milliseconds stop_grace{60'000};   // to save in, after a signal
  std::chrono::milliseconds fault_grace{10'000};  // to end in, after another rank failed
};

struct LaunchResult {
  // 0 if all ranks ended with 0. 128 + the signal if they were asked to stop, and did. Else that of
  // the first rank that failed in the last start, 128 + the signal for one that was killed: 137 for
  // ranks that were asked to stop and had to be killed.
  int exit_code = 0;
  int64_t restarts = 0;
};

// Runs the ranks until all have ended. What happens is told in the log.
//   SIGTERM, SIGINT and SIGHUP (unless it is ignored, as under nohup) go to all ranks; those that
// have not ended after stop_grace, or when a second SIGTERM or SIGINT comes, are killed. A rank
// that ends with 129, 130 or 143 had such a signal itself: it goes to the others, too.
//   A rank that ends in any other way but with 0 has failed. The others get SIGTERM, and SIGKILL
// after fault_grace; then all are started anew. Not so after exit code 2, for a wrong configuration
// stays wrong; after a stop signal; where run_dir's next checkpoint would not find room, or cannot
// be written; after max_restarts restarts; and after two restarts in a row that left no newer
// checkpoint in run_dir.
//   Children die with the launcher, even if that is killed by SIGKILL.
// Call from the main thread of a program without children of its own; its handling of these signals
// is as before afterwards. Throws std::runtime_error if a rank cannot be started or what ranks
// print on stdout could not be handed on; no rank runs then.
LaunchResult launch(const LaunchPlan& plan);

}  // namespace rwkv
