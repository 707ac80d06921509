// `rookery doctor --distributed`: one process of those that look at what lies between them.
#include <chrono>
#include <iostream>
#include <stdexcept>

#include <ATen/Parallel.h>

#include "train/commands/commands.h"
#include "train/commands/launch.h"
#include "train/device.h"
#include "train/distributed/link_times.h"
#include "train/distributed/placement.h"
#include "train/machine.h"
#include "train/run_config.h"
#include "train/run_main.h"

namespace rwkv {

int doctor_links_command(int argc, char** argv) {
  cxxopts::Options options = doctor_options();
  const auto parsed = parse_options(options, argc, argv, kDoctorExample, {});
  if (!parsed) {
    return 0;
  }
  const DoctorLinks asked = doctor_links_of(*parsed);
  const Placement placement = placement_from_environment();
  if (placement.world_size == 1) {
    throw std::invalid_argument(
        "rookery doctor --distributed: one process alone has no links; give --nproc 2, or start "
        "several as those of rookery train are started");
  }
  const std::string device_name = device_of(asked.device, placement);
  const OpenDevice device = open_device(device_name, "--device " + device_name);
  at::set_num_threads(
      static_cast<int>(std::max<int64_t>(describe_machine().cores / placement.local_size, 1)));
  const std::chrono::duration<double> timeout(DistributedConfig{}.timeout_s);
  Communicator communicator(
      placement, device, std::chrono::duration_cast<std::chrono::milliseconds>(timeout));
  const LinkReport report =
      time_links(communicator, {.max_bytes = asked.max_bytes, .runtime = device.runtime});
  if (placement.rank == 0) {
    std::cout << (parsed->count("json") > 0 ? links_as_json(report) : links_as_text(report));
  }
  return all_is_right(report) ? 0 : kExitFailed;
}

}  // namespace rwkv
