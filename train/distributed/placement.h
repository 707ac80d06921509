// Where this process stands among those that train together, as the program that started it says in
// the environment. No Torch.
//
// The first of these that is there counts:
//   torchrun, rookery train --nproc   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
//                                     MASTER_PORT
//   Open MPI's mpirun                 OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE; from
//                                     the user MASTER_ADDR, MASTER_PORT
//   SLURM's srun                      SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, and the lists of
//                                     tasks and hosts
// Open MPI comes before SLURM, for an mpirun inside of a SLURM job leaves SLURM's variables as they
// were: all its processes on a machine have the same SLURM_PROCID.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace rwkv {

struct Placement {
  int64_t rank = 0;        // 0 to world_size - 1
  int64_t world_size = 1;  // processes on all machines
  int64_t local_rank = 0;  // 0 to local_size - 1, among those of this machine
  int64_t local_size = 1;
  // Where rank 0 listens, or whoever started us; empty and 0 for one process alone.
  std::string master_host = {};
  int64_t master_port = 0;
  // The agent of torchrun already listens there: rank 0 connects, too, instead of listening.
  bool launcher_has_store = false;
  // "torchrun", "rookery train --nproc", "Open MPI", "SLURM"; empty if nobody said anything.
  std::string source = {};
  bool operator==(const Placement&) const = default;
};

// Names of environment variables and their values.
using Variables = std::map<std::string, std::string>;

// One process if nothing is set, or what is set says one. So is a shell inside of a SLURM job, and
// a batch script that asked for one task; one that asked for several and runs us without srun is
// refused, for the others would not come.
// SLURM's master is MASTER_ADDR and MASTER_PORT where they are given; else the first host of the
// step (or job), and port 15000 + the last four digits of the job's number. Two steps that
// train at the same time in one job need a MASTER_PORT each. Throws std::invalid_argument, naming
// variable, value, what was expected and what to do, for a set that is incomplete, contradicts
// itself or holds what is no number.
Placement placement_from(const Variables& variables);

// The same of this process' environment.
Placement placement_from_environment();

// The device of this process: of several on a machine each takes the GPU of its local rank for
// "cuda". Other devices are what they are.
std::string device_of(const std::string& device, const Placement& placement);

// The first host of a list as SLURM writes it: "node03" of "node[03-05,7],login". Throws
// std::invalid_argument with `name`, the variable it comes from, if that is no list.
std::string first_host(const std::string& name, const std::string& list);

}  // namespace rwkv
