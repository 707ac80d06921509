#include "train/distributed/placement.h"

#include <charconv>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <system_error>

#include <unistd.h>

namespace rwkv {
namespace {

// More processes, or tasks on one machine, than anybody has.
constexpr int64_t kMostProcesses = 1'000'000;
constexpr int64_t kMostPorts = 65535;

// Names of the variables of one kind of launcher, and what to do if they are wrong.
struct Names {
  const char* source;
  const char* rank;
  const char* world_size;
  const char* local_rank;
  const char* local_size;
  const char* advice;
};

constexpr Names kTorchrun = {
    "torchrun",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "torchrun and rookery train --nproc set them all; for one process unset them"};
constexpr Names kOpenMpi = {"Open MPI",
                            "OMPI_COMM_WORLD_RANK",
                            "OMPI_COMM_WORLD_SIZE",
                            "OMPI_COMM_WORLD_LOCAL_RANK",
                            "OMPI_COMM_WORLD_LOCAL_SIZE",
                            "mpirun sets them all; for one process unset them"};
constexpr Names kSlurm = {"SLURM",
                          "SLURM_PROCID",
                          "SLURM_NTASKS",
                          "SLURM_LOCALID",
                          "SLURM_NTASKS_PER_NODE",
                          "srun sets them; for one process unset SLURM_PROCID"};

std::string shown(const std::string& name, const std::string& value) {
  return name + " = \"" + value + "\"";
}

[[noreturn]] void refuse(const std::string& what, const std::string& advice) {
  throw std::invalid_argument("environment: " + what + "; " + advice);
}

std::optional<int64_t> whole_number(std::string_view text) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end ? std::optional(value) : std::nullopt;
}

// Looks variables up, and knows what to advise.
class Reader {
 public:
  Reader(const Variables& variables, const char* advice) : variables_(variables), advice_(advice) {}

  const std::string* find(const std::string& name) const {
    const auto found = variables_.find(name);
    // An empty one is how a script unsets it.
    return found == variables_.end() || found->second.empty() ? nullptr : &found->second;
  }
  // `because` names what asks for it: "RANK is set".
  const std::string& need(const std::string& name, const std::string& because) const {
    const std::string* value = find(name);
    if (value == nullptr) {
      refuse(because + ", but " + name + " is not", advice_);
    }
    return *value;
  }
  int64_t number(const std::string& name,
                 const std::string& because,
                 int64_t least,
                 int64_t most) const {
    const std::string& text = need(name, because);
    const auto value = whole_number(text);
    if (!value || *value < least || *value > most) {
      refuse(shown(name, text) + ": expected a whole number from " + std::to_string(least) +
                 " to " + std::to_string(most),
             advice_);
    }
    return *value;
  }
  const char* advice() const { return advice_; }

 private:
  const Variables& variables_;
  const char* advice_;
};

void require_below(const Reader& reader,
                   const std::string& name,
                   int64_t value,
                   const std::string& size_name,
                   int64_t size) {
  if (value >= size) {
    refuse(name + " = " + std::to_string(value) + " and " + size_name + " = " +
               std::to_string(size) + ": expected " + name + " from 0 to " +
               std::to_string(size - 1),
           reader.advice());
  }
}

std::string is_set(const char* name) {
  return std::string(name) + " is set";
}

// What the three kinds share: ranks and sizes that fit together. `local_size` is read by the
// caller.
Placement read_ranks(const Reader& reader, const Names& names) {
  const std::string because = is_set(names.rank);
  Placement placement;
  placement.source = names.source;
  placement.rank = reader.number(names.rank, because, 0, kMostProcesses);
  placement.world_size = reader.number(names.world_size, because, 1, kMostProcesses);
  require_below(reader, names.rank, placement.rank, names.world_size, placement.world_size);
  return placement;
}

void read_local(const Reader& reader,
                const Names& names,
                const std::string& size_name,
                int64_t local_size,
                Placement& placement) {
  placement.local_size = local_size;
  placement.local_rank = reader.number(names.local_rank, is_set(names.rank), 0, kMostProcesses);
  require_below(reader, names.local_rank, placement.local_rank, size_name, local_size);
  if (local_size > placement.world_size) {
    refuse(size_name + " = " + std::to_string(local_size) + " is more than " + names.world_size +
               " = " + std::to_string(placement.world_size),
           reader.advice());
  }
}

void read_master(const Reader& reader, const std::string& because, Placement& placement) {
  placement.master_host = reader.need("MASTER_ADDR", because);
  placement.master_port = reader.number("MASTER_PORT", because, 1, kMostPorts);
}

Placement placement_of_torchrun(const Variables& variables) {
  const Reader reader(variables, kTorchrun.advice);
  Placement placement = read_ranks(reader, kTorchrun);
  if (reader.find("ROOKERY_LAUNCHER") != nullptr) {
    placement.source = "rookery train --nproc";
  }
  if (placement.world_size == 1) {
    return placement;
  }
  const std::string because = is_set(kTorchrun.rank);
  const int64_t local_size = reader.number(kTorchrun.local_size, because, 1, kMostProcesses);
  read_local(reader, kTorchrun, kTorchrun.local_size, local_size, placement);
  read_master(reader, because, placement);
  const std::string* store = reader.find("TORCHELASTIC_USE_AGENT_STORE");
  placement.launcher_has_store = store != nullptr && *store == "True";
  return placement;
}

Placement placement_of_open_mpi(const Variables& variables) {
  const Reader reader(variables, kOpenMpi.advice);
  Placement placement = read_ranks(reader, kOpenMpi);
  if (placement.world_size == 1) {
    return placement;
  }
  const std::string because = is_set(kOpenMpi.rank);
  const int64_t local_size = reader.number(kOpenMpi.local_size, because, 1, kMostProcesses);
  read_local(reader, kOpenMpi, kOpenMpi.local_size, local_size, placement);
  // mpirun does not say where rank 0 can be reached.
  const Reader of_user(variables,
                       "give mpirun the host of rank 0 and a free port there: "
                       "-x MASTER_ADDR=host -x MASTER_PORT=29500");
  read_master(of_user, because, placement);
  return placement;
}

// Of "4(x2),3", tasks on each machine, those of machine `node`; nothing if the list is shorter or
// is none.
std::optional<int64_t> tasks_of_node(std::string_view list, int64_t node) {
  while (!list.empty()) {
    std::string_view entry = list.substr(0, list.find(','));
    list.remove_prefix(entry.size() == list.size() ? entry.size() : entry.size() + 1);
    int64_t repeats = 1;
    if (const size_t open = entry.find("(x"); open != entry.npos && entry.ends_with(')')) {
      repeats = whole_number(entry.substr(open + 2, entry.size() - open - 3)).value_or(0);
      entry = entry.substr(0, open);
    }
    const auto tasks = whole_number(entry);
    if (!tasks || *tasks < 1 || *tasks > kMostProcesses || repeats < 1) {
      return std::nullopt;
    }
    if (node < repeats) {
      return tasks;
    }
    node -= repeats;
  }
  return std::nullopt;
}

// How many tasks of the step are on this machine. The lists know machines with fewer tasks than
// others, the number that the user asked for does not.
void read_slurm_local(const Reader& reader, Placement& placement) {
  for (const char* name : {"SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"}) {
    const std::string* list = reader.find(name);
    if (list == nullptr) {
      continue;
    }
    // A list of one number goes for all machines, whichever this one is.
    const bool uniform = list->find(',') == list->npos;
    const int64_t node =
        uniform ? 0 : reader.number("SLURM_NODEID", is_set(name), 0, kMostProcesses);
    const auto tasks = tasks_of_node(*list, node);
    if (!tasks) {
      refuse(shown(name, *list) + ": expected tasks of each machine, as in 4(x2),3, with machine " +
                 std::to_string(node),
             reader.advice());
    }
    read_local(reader, kSlurm, name, *tasks, placement);
    return;
  }
  const int64_t tasks = reader.number(kSlurm.local_size, is_set(kSlurm.rank), 1, kMostProcesses);
  read_local(reader, kSlurm, kSlurm.local_size, tasks, placement);
}

std::string slurm_master_host(const Reader& reader) {
  if (const std::string* given = reader.find("MASTER_ADDR")) {
    return *given;
  }
  // Rank 0 is on the first machine of the step, which may have fewer than the job.
  for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"}) {
    if (const std::string* list = reader.find(name)) {
      return first_host(name, *list);
    }
  }
  return first_host("SLURM_NODELIST", reader.need("SLURM_NODELIST", is_set(kSlurm.rank)));
}

int64_t slurm_master_port(const Reader& reader) {
  const std::string because = is_set(kSlurm.rank);
  if (reader.find("MASTER_PORT") != nullptr) {
    return reader.number("MASTER_PORT", because, 1, kMostPorts);
  }
  // Jobs that share a machine get different ports, below those that Linux gives to anybody (32768).
  constexpr int64_t kFirstPort = 15000;
  constexpr int64_t kPorts = 10000;
  return kFirstPort + reader.number("SLURM_JOB_ID", because, 0, INT64_MAX) % kPorts;
}

Placement placement_of_slurm(const Variables& variables) {
  const Reader reader(variables, kSlurm.advice);
  const bool in_step = reader.find("SLURM_STEP_ID") != nullptr;
  // A batch script has a rank, too, and a number of tasks only if it asked for one.
  if (!in_step && reader.find(kSlurm.world_size) == nullptr) {
    return {};
  }
  Placement placement = read_ranks(reader, kSlurm);
  if (placement.world_size == 1) {
    return placement;
  }
  const std::string* environment = reader.find("ENVIRONMENT");
  if (!in_step && environment != nullptr && *environment == "BATCH") {
    refuse(std::string(kSlurm.world_size) + " = " + std::to_string(placement.world_size) +
               ", but the batch script itself started this process, and so only once",
           "start it with srun, or with --nproc if all tasks are on this machine");
  }
  read_slurm_local(reader, placement);
  placement.master_host = slurm_master_host(reader);
  placement.master_port = slurm_master_port(reader);
  return placement;
}

}  // namespace

std::string device_of(const std::string& device, const Placement& placement) {
  return device == "cuda" && placement.world_size > 1
             ? device + ":" + std::to_string(placement.local_rank)
             : device;
}

std::string first_host(const std::string& name, const std::string& list) {
  std::string host;
  bool is_list = true;
  for (size_t i = 0; i < list.size() && list[i] != ',' && is_list; ++i) {
    if (list[i] != '[') {
      host += list[i];
      is_list = list[i] != ']' && list[i] != ' ';
      continue;
    }
    // Of "[03-05,7]" the first number, with its zeros.
    const size_t close = list.find(']', i);
    const size_t end = list.find_first_not_of("0123456789", i + 1);
    is_list = close != list.npos && end != i + 1 &&
              std::string_view("-,]").find(list[end]) != std::string_view::npos;
    if (is_list) {
      host += list.substr(i + 1, end - i - 1);
      i = close;
    }
  }
  if (!is_list || host.empty()) {
    refuse(shown(name, list) + ": expected a list of hosts, as in node[03-05,7]",
           "give the host of rank 0 as MASTER_ADDR");
  }
  return host;
}

Placement placement_from(const Variables& variables) {
  const Reader reader(variables, kTorchrun.advice);
  if (reader.find(kTorchrun.rank) != nullptr) {
    return placement_of_torchrun(variables);
  }
  if (reader.find(kOpenMpi.rank) != nullptr) {
    return placement_of_open_mpi(variables);
  }
  if (reader.find(kSlurm.rank) != nullptr) {
    return placement_of_slurm(variables);
  }
  for (const char* name : {kTorchrun.world_size, kTorchrun.local_rank, kTorchrun.local_size}) {
    if (const std::string* value = reader.find(name)) {
      refuse(shown(name, *value) + " is set, but RANK is not", reader.advice());
    }
  }
  if (const std::string* size = reader.find(kOpenMpi.world_size)) {
    refuse(shown(kOpenMpi.world_size, *size) + " is set, but " + kOpenMpi.rank + " is not",
           kOpenMpi.advice);
  }
  return {};
}

Placement placement_from_environment() {
  Variables variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (const size_t equals = text.find('='); equals != text.npos) {
      variables.emplace(text.substr(0, equals), text.substr(equals + 1));
    }
  }
  return placement_from(variables);
}

}  // namespace rwkv
