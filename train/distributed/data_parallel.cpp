#include "train/distributed/data_parallel.h"

#include <algorithm>
#include <deque>
#include <numeric>

#include <ATen/ATen.h>

namespace rwkv {
namespace {

// At stage 2 gradients have no memory but their buckets': while one is reduced, backward fills the
// next. On a CPU each reduction under way has memory for the other processes' parts.
constexpr size_t kMaxUnderWay = 2;

}  // namespace

DataParallel::DataParallel(Communicator& communicator, Optimizer& optimizer)
    : communicator_(communicator),
      optimizer_(optimizer),
      zero_stage_(optimizer.sharding().zero_stage),
      is_bounded_(zero_stage_ == 2 || (zero_stage_ == 1 && optimizer.control().is_cpu())),
      reductions_(optimizer.buckets().size()),
      order_(reductions_.size()) {
  const std::vector<GradientPlace> places = optimizer.gradient_places();
  buckets_of_place_.resize(places.size());
  std::vector<size_t> first_place(reductions_.size(), places.size());
  for (size_t place = 0; place < places.size(); ++place) {
    const GradientPlace& at = places[place];
    for (size_t i = 0; i < reductions_.size(); ++i) {
      const Bucket& bucket = optimizer.buckets()[i];
      if (at.store == bucket.store && at.begin < bucket.end && at.end > bucket.begin) {
        buckets_of_place_[place].push_back(i);
        ++reductions_[i].num_places;
        first_place[i] = std::min(first_place[i], place);
      }
    }
  }
  // Parameters are in the model's order, which backward walks from its end: a bucket is complete
  // with the first of its own.
  std::iota(order_.begin(), order_.end(), size_t{0});
  std::ranges::stable_sort(order_,
                           [&](size_t x, size_t y) { return first_place[x] > first_place[y]; });
  optimizer_.set_gradient_listener([this](size_t place) { note(place); });
}

DataParallel::~DataParallel() {
  optimizer_.set_gradient_listener(nullptr);
}

void DataParallel::begin_pass(bool is_last) {
  counting_ = is_last || zero_stage_ == 2;
  for (Reduction& reduction : reductions_) {
    reduction.missing = reduction.num_places;
  }
  next_ = settled_ = 0;
}

void DataParallel::note(size_t place) {
  if (!counting_) {
    return;
  }
  for (const size_t bucket : buckets_of_place_[place]) {
    --reductions_[bucket].missing;
  }
  send_ready();
}

void DataParallel::send_ready() {
  constexpr const char* kWhat = "the sum of gradients";
  for (; next_ < order_.size() && reductions_[order_[next_]].missing <= 0; ++next_) {
    if (is_bounded_ && next_ - settled_ == kMaxUnderWay) {
      settle(order_[settled_++]);
    }
    const size_t bucket = order_[next_];
    const at::Tensor gradient = optimizer_.gradient_of(bucket);
    reductions_[bucket].under_way =
        zero_stage_ == 0 ? communicator_.begin_sum(gradient, kWhat)
                         : communicator_.begin_reduce_scatter(
                               gradient, optimizer_.own_part(gradient, bucket), kWhat);
  }
}

void DataParallel::settle(size_t bucket) {
  reductions_[bucket].under_way->wait();
  reductions_[bucket].under_way.reset();
  if (zero_stage_ == 2) {
    optimizer_.keep_reduced(bucket);
  }
}

void DataParallel::finish_pass() {
  if (!counting_) {
    return;
  }
  for (Reduction& reduction : reductions_) {
    reduction.missing = 0;
  }
  send_ready();
  for (; settled_ < order_.size(); ++settled_) {
    settle(order_[settled_]);
  }
  counting_ = false;
}

void DataParallel::add_empty_pass(bool is_last) {
  if (zero_stage_ == 2) {
    begin_pass(is_last);
    optimizer_.accumulate_gradient();
    finish_pass();
  }
}

void DataParallel::update(const at::Tensor& loss) {
  constexpr const char* kWhat = "the sum of losses";
  if (zero_stage_ == 0) {
    communicator_.sum(loss, kWhat);
    optimizer_.update(loss);
    return;
  }
  const at::Tensor numbers =
      at::stack({loss.to(at::kDouble), optimizer_.sum_of_squares()}).contiguous();
  communicator_.sum(numbers, kWhat);
  optimizer_.begin_update(numbers.select(0, 1), numbers.select(0, 0));
  std::deque<std::unique_ptr<PendingCollective>> under_way;
  for (size_t bucket = 0; bucket < optimizer_.buckets().size(); ++bucket) {
    optimizer_.update_bucket(bucket);
    if (under_way.size() == kMaxUnderWay && optimizer_.control().is_cpu()) {
      under_way.front()->wait();
      under_way.pop_front();
    }
    const at::Tensor weights = optimizer_.weights_of(bucket);
    under_way.push_back(communicator_.begin_all_gather(
        optimizer_.own_part(weights, bucket), weights, "the gathering of weights"));
  }
  for (const auto& gathering : under_way) {
    gathering->wait();
  }
}

}  // namespace rwkv
