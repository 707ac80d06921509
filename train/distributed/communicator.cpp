#include "train/distributed/communicator.h"

#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/Flags.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <netdb.h>
#include <spdlog/fmt/fmt.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <unistd.h>

namespace rwkv {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kBeat{500};
// A process that has missed as many beats is taken for gone once something has failed; a busy
// machine may delay some.
constexpr milliseconds kSilence = 5 * kBeat;
constexpr int kOperationTimeouts = 10;
constexpr milliseconds kNoteInterval{20};
// Messages of c10d with one tag arrive in the order in which they are sent; those of operations
// that may overlap have tags of their own, beside the 0 of send().
constexpr int kMostTag = 1 << 20;

std::vector<uint8_t> bytes_of(const std::string& text) {
  return {text.begin(), text.end()};
}
std::string text_of(const std::vector<uint8_t>& bytes) {
  return {bytes.begin(), bytes.end()};
}
std::string key(const char* name, int64_t rank) {
  return std::string(name) + "/" + std::to_string(rank);
}

double seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

// What a library says in its first line.
std::string first_line(const char* text) {
  const std::string all(text);
  return all.substr(0, all.find('\n'));
}

// The address of this machine through which it reaches `host`: that of Gloo's connections.
std::string address_towards(const std::string& host, int64_t port) {
  addrinfo* found = nullptr;
  const addrinfo hints{.ai_flags = 0,
                       .ai_family = AF_UNSPEC,
                       .ai_socktype = SOCK_DGRAM,
                       .ai_protocol = 0,
                       .ai_addrlen = 0,
                       .ai_addr = nullptr,
                       .ai_canonname = nullptr,
                       .ai_next = nullptr};
  if (const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
      error != 0) {
    throw DistributedError("the master's address " + host + " is not known: " +
                           gai_strerror(error) + "; give the one that this machine reaches it by");
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owned(found, &freeaddrinfo);
  // A datagram socket that is connected has an address and sends nothing.
  const int socket_fd = socket(found->ai_family, SOCK_DGRAM, 0);
  sockaddr_storage own{};
  socklen_t own_len = sizeof own;
  char name[NI_MAXHOST] = {};
  const bool has_address =
      socket_fd >= 0 && connect(socket_fd, found->ai_addr, found->ai_addrlen) == 0 &&
      getsockname(socket_fd, reinterpret_cast<sockaddr*>(&own), &own_len) == 0 &&
      getnameinfo(reinterpret_cast<sockaddr*>(&own),
                  own_len,
                  name,
                  sizeof name,
                  nullptr,
                  0,
                  NI_NUMERICHOST) == 0;
  if (socket_fd >= 0) {
    close(socket_fd);
  }
  if (!has_address) {
    throw DistributedError("this machine has no address from which it reaches the master's, " +
                           host + "; is the network up?");
  }
  return name;
}

c10::intrusive_ptr<c10d::Store> connect_store(const Placement& placement,
                                              bool serves,
                                              milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(placement.master_port);
  options.isServer = serves;
  options.waitWorkers = false;
  options.timeout = timeout;
  // torchrun's store outlives the processes: those that it starts anew must not find the last words
  // of the ones before.
  const char* const attempt = std::getenv("TORCHELASTIC_RESTART_COUNT");
  return c10::make_intrusive<c10d::PrefixStore>(
      std::string("rookery/") + (attempt == nullptr ? "0" : attempt),
      c10::make_intrusive<c10d::TCPStore>(placement.master_host, options));
}

// ---- Who is there -------------------------------------------------------------------------------

// Says that this process is there, and listens who else is. Where one is lost, and this process
// waits in an operation that does not notice, it ends this process.
class Presence {
 public:
  Presence(const Placement& placement, c10::intrusive_ptr<c10d::Store> store, milliseconds timeout)
      : placement_(placement), timeout_(timeout), store_(std::move(store)) {
    contact_ = Clock::now();
    heard_.resize(static_cast<size_t>(placement_.world_size), {.beat = "", .at = contact_});
    talk();
    talker_ = std::thread([this] { repeat([this] { talk(); }); });
    watcher_ = std::thread([this] { repeat([this] { watch(); }); });
  }
  ~Presence() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    watcher_.join();
    talker_.join();
  }
  Presence(const Presence&) = delete;
  Presence& operator=(const Presence&) = delete;

  void set_activity(const std::string& activity) {
    const std::lock_guard lock(mutex_);
    activity_ = activity;
  }
  std::string activity() {
    const std::lock_guard lock(mutex_);
    return activity_.empty() ? "" : activity_ + ": ";
  }

  // While it lives, this process is in the operation `what`, which an end in it names.
  class Operation {
   public:
    Operation(Presence& presence, const char* what) : presence_(presence) {
      const std::lock_guard lock(presence_.mutex_);
      place_ = presence_.operations_.insert(presence_.operations_.end(), what);
    }
    ~Operation() {
      const std::lock_guard lock(presence_.mutex_);
      presence_.operations_.erase(place_);
    }
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;

   private:
    Presence& presence_;
    std::list<const char*>::iterator place_;
  };

  void announce_failure(const std::string& reason) {
    {
      const std::lock_guard lock(mutex_);
      fails_ = true;
    }
    const std::lock_guard lock(store_mutex_);
    try {
      store_->set(key("failed", placement_.rank), bytes_of(reason));
    } catch (const std::exception&) {
      // Nobody is left to read it.
    }
  }

  // Whether one of the others is lost, or one of all has said that it fails.
  bool has_lost() {
    {
      const std::lock_guard lock(mutex_);
      if (fails_ || !failed_.empty()) {
        return true;
      }
    }
    return !silent_for(timeout_).empty();
  }

  // What is known of the others, in a sentence, after something has failed: waits for as long as it
  // takes to know who is silent.
  std::string describe() {
    const Clock::time_point end = Clock::now() + std::min(timeout_, 2 * kSilence);
    for (;;) {
      std::string found = words_of_the_failed();
      const std::string silent = silent_for(kSilence);
      found += (found.empty() || silent.empty() ? "" : "; ") + silent;
      if (!found.empty() || Clock::now() >= end) {
        return found;
      }
      std::this_thread::sleep_for(kBeat / 2);
    }
  }

 private:
  struct Heard {
    std::string beat;
    Clock::time_point at;
  };

  template <typename Work>
  void repeat(const Work& work) {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kBeat, [this] { return ending_; })) {
      lock.unlock();
      work();
      lock.lock();
    }
  }

  void talk() {
    try {
      const std::lock_guard lock(store_mutex_);
      store_->set(key("beat", placement_.rank), bytes_of(std::to_string(++count_)));
      for (int64_t rank = 0; rank < placement_.world_size; ++rank) {
        const std::string name = key("beat", rank);
        if (store_->check({name})) {
          note(rank, text_of(store_->get(name)));
        }
        const std::string failed = key("failed", rank);
        if (rank != placement_.rank && store_->check({failed})) {
          note_failure(rank, text_of(store_->get(failed)));
        }
      }
      const std::lock_guard own(mutex_);
      contact_ = Clock::now();
    } catch (const std::exception&) {
      // watch() sees how long there was no contact.
    }
  }

  void note(int64_t rank, const std::string& beat) {
    const std::lock_guard lock(mutex_);
    Heard& heard = heard_[static_cast<size_t>(rank)];
    if (heard.beat != beat) {
      heard = {.beat = beat, .at = Clock::now()};
    }
  }
  void note_failure(int64_t rank, const std::string& reason) {
    const std::lock_guard lock(mutex_);
    if (failed_.empty()) {
      failure_seen_ = Clock::now();
    }
    failed_[rank] = reason;
  }

  // An operation of a GPU cannot be interrupted, and one of Gloo waits longer than this.
  void watch() {
    std::string lost = silent_for(timeout_);
    if (lost.empty()) {
      const std::lock_guard lock(mutex_);
      if (!failed_.empty() && Clock::now() - failure_seen_ > 2 * kSilence) {
        lost = words_of_the_failed_locked();
      }
    }
    if (!lost.empty()) {
      spdlog::critical("{}{}{}; so rank {} ends", activity(), operations(), lost, placement_.rank);
      spdlog::default_logger()->flush();
      std::_Exit(1);
    }
  }

  // Of any thread: a save may wait beside the step.
  std::string operations() {
    const std::lock_guard lock(mutex_);
    std::string words;
    for (const char* what : operations_) {
      words += fmt::format("{}{}", words.empty() ? "in " : " and ", what);
    }
    return words.empty() ? "" : words + ": ";
  }

  std::string words_of_the_failed() {
    const std::lock_guard lock(mutex_);
    return words_of_the_failed_locked();
  }
  std::string words_of_the_failed_locked() const {
    std::string words;
    for (const auto& [rank, reason] : failed_) {
      words += fmt::format("{}rank {} ended: {}", words.empty() ? "" : "; ", rank, reason);
    }
    return words;
  }

  std::string silent_for(milliseconds allowed) {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    if (now - contact_ > allowed) {
      return fmt::format(
          "rank 0, which holds the store at {}:{}, has not been reached for {:.1f} s",
          placement_.master_host,
          placement_.master_port,
          seconds(now - contact_));
    }
    std::string words;
    for (int64_t rank = 0; rank < placement_.world_size; ++rank) {
      const auto since = now - heard_[static_cast<size_t>(rank)].at;
      if (rank != placement_.rank && since > allowed) {
        words += fmt::format("{}rank {} has not been heard of for {:.1f} s",
                             words.empty() ? "" : "; ",
                             rank,
                             seconds(since));
      }
    }
    return words;
  }

  Placement placement_;
  milliseconds timeout_;
  std::mutex store_mutex_;  // a connection serves one caller at a time
  c10::intrusive_ptr<c10d::Store> store_;
  int64_t count_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::string activity_;
  std::list<const char*> operations_;
  Clock::time_point contact_;  // last, with the store
  std::vector<Heard> heard_;
  std::map<int64_t, std::string> failed_;
  Clock::time_point failure_seen_;
  bool fails_ = false;  // this process
  bool ending_ = false;
  std::thread talker_;
  std::thread watcher_;
};

}  // namespace

// ---- Operations ---------------------------------------------------------------------------------

namespace {

// Parts on their way between this process and all others.
struct Exchange {
  std::vector<c10::intrusive_ptr<c10d::Work>> receiving;
  std::vector<c10::intrusive_ptr<c10d::Work>> sending;
};

}  // namespace

class Communicator::Impl {
 public:
  Impl(const Placement& placement, const OpenDevice& device, milliseconds timeout)
      : placement_(placement),
        timeout_(timeout),
        serves_(placement.rank == 0 && !placement.launcher_has_store) {
    // c10d logs what it then throws, with pages of addresses.
    FLAGS_caffe2_log_level = c10::GLOG_ERROR;
    const std::string address = fmt::format("{}:{}", placement.master_host, placement.master_port);
    try {
      store_ = connect_store(placement, serves_, timeout);
      wait_for_all(address);
      presence_ =
          std::make_unique<Presence>(placement, connect_store(placement, false, timeout), timeout);
      // Longer than what one process may do while the others wait for it, such as writing a sample.
      auto options = c10d::ProcessGroupGloo::Options::create(kOperationTimeouts * timeout);
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(
          address_towards(placement.master_host, placement.master_port)));
      gloo_ = c10::make_intrusive<c10d::ProcessGroupGloo>(
          c10::make_intrusive<c10d::PrefixStore>("gloo", store_),
          static_cast<int>(placement.rank),
          static_cast<int>(placement.world_size),
          options);
    } catch (const DistributedError&) {
      throw;
    } catch (const std::exception& error) {
      throw DistributedError(fmt::format(
          "rank {} of {}: the others cannot be reached at {}: {}; expected rank 0's machine and a "
          "port that is free there, the same for every rank",
          placement.rank,
          placement.world_size,
          address,
          first_line(error.what())));
    }
    data_ = gloo_;
    if (device.runtime != nullptr) {
      guarded("the meeting of the devices", [&] {
        device.runtime->make_collectives(c10::make_intrusive<c10d::PrefixStore>("data", store_),
                                         static_cast<int>(placement.rank),
                                         static_cast<int>(placement.world_size),
                                         kOperationTimeouts * timeout,
                                         data_);
      });
    }
    barrier("the first meeting");
  }

  ~Impl() {
    presence_.reset();
    try {
      // The store ends with its process: that one waits until nobody asks it any more.
      store_->set(key("left", placement_.rank), bytes_of("yes"));
      const Clock::time_point end = Clock::now() + kSilence;
      for (int64_t rank = 0; serves_ && rank < placement_.world_size; ++rank) {
        while (!store_->check({key("left", rank)}) && Clock::now() < end) {
          std::this_thread::sleep_for(milliseconds(10));
        }
      }
    } catch (const std::exception&) {
      // It has ended already.
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const Placement& placement() const { return placement_; }
  void wait_for(const std::vector<c10::intrusive_ptr<c10d::Work>>& works) {
    const Clock::time_point begin = Clock::now();
    for (const auto& work : works) {
      work->wait();
    }
    waited_ += Clock::now() - begin;
  }
  Clock::duration waited() const { return waited_; }
  void set_activity(const std::string& activity) { presence_->set_activity(activity); }
  void announce_failure(const std::string& reason) { presence_->announce_failure(reason); }

  // Runs `work`, whose errors are said in full.
  template <typename Work>
  auto guarded(const char* what, const Work& work) -> decltype(work()) {
    const Presence::Operation operation(*presence_, what);
    try {
      return work();
    } catch (const std::exception& error) {
      const std::string others = presence_->describe();
      throw DistributedError(fmt::format(
          "{}{} failed on rank {}: {}{}",
          presence_->activity(),
          what,
          placement_.rank,
          others,
          (others.empty() ? "" : " (") + first_line(error.what()) + (others.empty() ? "" : ")")));
    }
  }

  c10::intrusive_ptr<c10d::Work> sum(std::vector<at::Tensor>& tensors) {
    return group_of(tensors.front()).allreduce(tensors);
  }
  c10::intrusive_ptr<c10d::Work> greatest_of(std::vector<at::Tensor>& tensors) {
    c10d::AllreduceOptions options;
    options.reduceOp = c10d::ReduceOp::MAX;
    return group_of(tensors.front()).allreduce(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> reduce_scatter(at::Tensor whole, at::Tensor part) {
    return data_->_reduce_scatter_base(part, whole);
  }
  c10::intrusive_ptr<c10d::Work> all_gather(at::Tensor part, at::Tensor whole) {
    return data_->_allgather_base(whole, part);
  }
  // Gloo's own reduce-scatter sums the whole on every process, and its all-gather copies: here each
  // process exchanges a part with each other one. `sent` and `received` are by rank; this process's
  // own are left alone.
  Exchange exchange(const std::vector<at::Tensor>& sent, const std::vector<at::Tensor>& received) {
    const int64_t n = placement_.world_size;
    const int tag = 1 + tag_;
    tag_ = tag % kMostTag;
    Exchange under_way;
    for (int64_t step = 1; step < n; ++step) {
      const int64_t from = (placement_.rank + n - step) % n;
      std::vector<at::Tensor> place{received[static_cast<size_t>(from)]};
      under_way.receiving.push_back(gloo_->recv(place, static_cast<int>(from), tag));
    }
    for (int64_t step = 1; step < n; ++step) {
      const int64_t to = (placement_.rank + step) % n;
      std::vector<at::Tensor> part{sent[static_cast<size_t>(to)]};
      under_way.sending.push_back(gloo_->send(part, static_cast<int>(to), tag));
    }
    return under_way;
  }
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors, int64_t from) {
    c10d::BroadcastOptions options;
    options.rootRank = from;
    return group_of(tensors.front()).broadcast(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int64_t to) {
    return group_of(tensors.front()).send(tensors, static_cast<int>(to), 0);
  }
  c10::intrusive_ptr<c10d::Work> receive(std::vector<at::Tensor>& tensors, int64_t from) {
    return group_of(tensors.front()).recv(tensors, static_cast<int>(from), 0);
  }
  void barrier(const char* what) {
    std::vector<at::Tensor> nothing{at::zeros({1})};
    guarded(what, [&] { sum(nothing)->wait(); });
  }

  void leave_note(const std::string& name, const std::string& text) {
    guarded(("the note " + name).c_str(), [&] { store_->set("note/" + name, bytes_of(text)); });
  }
  std::string read_note(const std::string& name, const char* what) {
    return guarded(what, [&] {
      while (!store_->check({"note/" + name})) {
        if (presence_->has_lost()) {
          throw std::runtime_error("nobody has said it");
        }
        std::this_thread::sleep_for(kNoteInterval);
      }
      return text_of(store_->get("note/" + name));
    });
  }
  void remove_note(const std::string& name) {
    guarded(("the note " + name).c_str(), [&] { store_->deleteKey("note/" + name); });
  }

 private:
  c10d::Backend& group_of(const at::Tensor& tensor) { return tensor.is_cpu() ? *gloo_ : *data_; }

  void wait_for_all(const std::string& address) {
    store_->set(key("here", placement_.rank), bytes_of("yes"));
    const Clock::time_point end = Clock::now() + timeout_;
    for (int64_t rank = 0; rank < placement_.world_size; ++rank) {
      while (!store_->check({key("here", rank)})) {
        if (Clock::now() > end) {
          throw DistributedError(
              fmt::format("{}: rank {} of {} did not come within {:.0f} s; were all "
                          "started, with the same address?",
                          address,
                          rank,
                          placement_.world_size,
                          seconds(timeout_)));
        }
        std::this_thread::sleep_for(milliseconds(20));
      }
    }
  }

  Placement placement_;
  milliseconds timeout_;
  bool serves_;
  Clock::duration waited_{};
  c10::intrusive_ptr<c10d::Store> store_;
  std::unique_ptr<Presence> presence_;
  c10::intrusive_ptr<c10d::Backend> gloo_;
  c10::intrusive_ptr<c10d::Backend> data_;
  int tag_ = 0;  // of the last exchange
};

namespace {

class PendingWork final : public PendingCollective {
 public:
  PendingWork(std::vector<at::Tensor> tensors, std::function<void()> wait)
      : tensors_(std::move(tensors)), wait_(std::move(wait)) {}
  void wait() override { wait_(); }

 private:
  std::vector<at::Tensor> tensors_;
  std::function<void()> wait_;
};

}  // namespace

Communicator::Communicator(const Placement& placement,
                           const OpenDevice& device,
                           milliseconds timeout)
    : impl_(std::make_unique<Impl>(placement, device, timeout)) {}
Communicator::~Communicator() = default;

int64_t Communicator::rank() const {
  return impl_->placement().rank;
}
int64_t Communicator::world_size() const {
  return impl_->placement().world_size;
}
double Communicator::waited_ms() const {
  return 1000 * seconds(impl_->waited());
}
void Communicator::set_activity(const std::string& activity) {
  impl_->set_activity(activity);
}

template <typename Begin>
std::unique_ptr<PendingCollective> Communicator::begin(std::vector<at::Tensor> tensors,
                                                       const char* what,
                                                       const Begin& begin) {
  const auto work = impl_->guarded(what, [&] { return begin(tensors); });
  return std::make_unique<PendingWork>(std::move(tensors), [this, work, what] {
    impl_->guarded(what, [&] { impl_->wait_for({work}); });
  });
}

std::unique_ptr<PendingCollective> Communicator::begin_sum(const at::Tensor& tensor,
                                                           const char* what) {
  return begin({tensor}, what, [this](auto& tensors) { return impl_->sum(tensors); });
}

std::unique_ptr<PendingCollective> Communicator::begin_reduce_scatter(const at::Tensor& whole,
                                                                      const at::Tensor& part,
                                                                      const char* what) {
  if (!whole.is_cpu()) {
    return begin({whole, part}, what, [this](auto& tensors) {
      return impl_->reduce_scatter(tensors[0], tensors[1]);
    });
  }
  const auto own = static_cast<size_t>(rank());
  const at::Tensor scratch = at::empty({world_size() - 1, part.numel()}, part.options());
  std::vector<at::Tensor> terms = scratch.unbind();
  const std::vector<at::Tensor> parts = whole.view({world_size(), -1}).unbind();
  terms.insert(terms.begin() + rank(), parts[own]);
  const Exchange under_way = impl_->guarded(what, [&] { return impl_->exchange(parts, terms); });
  return std::make_unique<PendingWork>(
      std::vector{whole, part}, [this, what, under_way, terms, scratch, part] {
        impl_->guarded(what, [&] { impl_->wait_for(under_way.receiving); });
        // In the order of the ranks. What is not the last sum takes the place of a term that is in
        // it.
        at::Tensor sum = terms[0];
        for (size_t i = 1; i < terms.size(); ++i) {
          at::Tensor place = i + 1 == terms.size() ? part.view({-1}) : scratch[0];
          at::add_out(place, sum, terms[i]);
          sum = place;
        }
        impl_->guarded(what, [&] { impl_->wait_for(under_way.sending); });
      });
}

std::unique_ptr<PendingCollective> Communicator::begin_all_gather(const at::Tensor& part,
                                                                  const at::Tensor& whole,
                                                                  const char* what) {
  if (!whole.is_cpu()) {
    return begin({part, whole}, what, [this](auto& tensors) {
      return impl_->all_gather(tensors[0], tensors[1]);
    });
  }
  const std::vector<at::Tensor> parts = whole.view({world_size(), -1}).unbind();
  const at::Tensor own = parts[static_cast<size_t>(rank())];
  if (own.const_data_ptr() != part.const_data_ptr()) {
    own.copy_(part.view({-1}));
  }
  const std::vector<at::Tensor> sent(parts.size(), own);
  const Exchange under_way = impl_->guarded(what, [&] { return impl_->exchange(sent, parts); });
  return std::make_unique<PendingWork>(std::vector{whole}, [this, what, under_way] {
    impl_->guarded(what, [&] {
      impl_->wait_for(under_way.receiving);
      impl_->wait_for(under_way.sending);
    });
  });
}

void Communicator::sum(const at::Tensor& tensor, const char* what) {
  begin_sum(tensor, what)->wait();
}

void Communicator::broadcast(const at::Tensor& tensor, int64_t from, const char* what) {
  std::vector<at::Tensor> tensors{tensor};
  impl_->guarded(what, [&] { impl_->broadcast(tensors, from)->wait(); });
}

void Communicator::send(const at::Tensor& tensor, int64_t to, const char* what) {
  std::vector<at::Tensor> tensors{tensor};
  impl_->guarded(what, [&] { impl_->send(tensors, to)->wait(); });
}

void Communicator::receive(const at::Tensor& tensor, int64_t from, const char* what) {
  std::vector<at::Tensor> tensors{tensor};
  impl_->guarded(what, [&] { impl_->receive(tensors, from)->wait(); });
}

int64_t Communicator::any_bits(int64_t bits, const char* what) {
  constexpr int64_t kBits = 63;
  // Gloo has no OR: the greatest of each bit is it.
  std::vector<at::Tensor> tensors{at::zeros({kBits}, at::kByte)};
  auto* each = tensors[0].mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < kBits; ++i) {
    each[i] = static_cast<uint8_t>((bits >> i) & 1);
  }
  impl_->guarded(what, [&] { impl_->greatest_of(tensors)->wait(); });
  int64_t all = 0;
  for (int64_t i = 0; i < kBits; ++i) {
    all |= static_cast<int64_t>(each[i]) << i;
  }
  return all;
}

std::vector<int64_t> Communicator::values_of_all(int64_t value, const char* what) {
  const at::Tensor values = at::zeros({world_size()}, at::kLong);
  auto* const each = values.mutable_data_ptr<int64_t>();
  each[rank()] = value;
  sum(values, what);
  return {each, each + world_size()};
}

std::string Communicator::text_of_first(const std::string& text, const char* what) {
  const at::Tensor length = at::full({1}, static_cast<int64_t>(text.size()), at::kLong);
  broadcast(length, 0, what);
  const at::Tensor bytes = at::zeros({std::max<int64_t>(length.item<int64_t>(), 1)}, at::kByte);
  if (rank() == 0) {
    std::copy(text.begin(), text.end(), bytes.mutable_data_ptr<uint8_t>());
  }
  broadcast(bytes, 0, what);
  const auto* data = bytes.const_data_ptr<uint8_t>();
  return {data, data + length.item<int64_t>()};
}

void Communicator::barrier(const char* what) {
  impl_->barrier(what);
}

void Communicator::leave_note(const std::string& name, const std::string& text) {
  impl_->leave_note(name, text);
}
std::string Communicator::read_note(const std::string& name, const char* what) {
  return impl_->read_note(name, what);
}
void Communicator::remove_note(const std::string& name) {
  impl_->remove_note(name);
}

void Communicator::announce_failure(const std::string& reason) {
  impl_->announce_failure(reason);
}

}  // namespace rwkv
