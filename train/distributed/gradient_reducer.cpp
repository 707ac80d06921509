#include "train/distributed/gradient_reducer.h"

#include <algorithm>

#include <ATen/ATen.h>

namespace rwkv {

GradientReducer::GradientReducer(Communicator& communicator,
                                 Optimizer& optimizer,
                                 int64_t bucket_bytes)
    : communicator_(communicator), optimizer_(optimizer) {
  const std::vector<at::Tensor> gradients = optimizer.gradients();
  const std::vector<GradientPlace> places = optimizer.gradient_places();
  struct Range {
    at::Tensor gradient;
    std::vector<size_t> places;  // that lie in it, rising
  };
  std::vector<Range> ranges;
  for (size_t store = 0; store < gradients.size(); ++store) {
    const int64_t size = gradients[store].numel();
    const int64_t step = std::max<int64_t>(bucket_bytes / gradients[store].element_size(), 1);
    for (int64_t begin = 0; begin < size; begin += step) {
      const int64_t end = std::min(begin + step, size);
      Range range{.gradient = gradients[store].slice(0, begin, end), .places = {}};
      for (size_t place = 0; place < places.size(); ++place) {
        const GradientPlace& at = places[place];
        if (at.store == store && at.begin < end && at.end > begin) {
          range.places.push_back(place);
        }
      }
      ranges.push_back(std::move(range));
    }
  }
  // Parameters are in the model's order, which backward walks from its end: a range is complete
  // with the first of its own.
  std::stable_sort(ranges.begin(), ranges.end(), [](const Range& x, const Range& y) {
    return x.places.front() > y.places.front();
  });
  buckets_of_place_.resize(places.size());
  for (const Range& range : ranges) {
    for (const size_t place : range.places) {
      buckets_of_place_[place].push_back(buckets_.size());
    }
    buckets_.push_back({.gradient = range.gradient,
                        .num_places = static_cast<int64_t>(range.places.size()),
                        .under_way = nullptr});
  }
  optimizer_.set_gradient_listener([this](size_t place) { note(place); });
}

GradientReducer::~GradientReducer() {
  optimizer_.set_gradient_listener(nullptr);
}

void GradientReducer::begin() {
  for (Bucket& bucket : buckets_) {
    bucket.missing = bucket.num_places;
  }
  next_ = 0;
  counting_ = true;
}

void GradientReducer::note(size_t place) {
  if (!counting_) {
    return;
  }
  for (const size_t bucket : buckets_of_place_[place]) {
    --buckets_[bucket].missing;
  }
  send_ready();
}

void GradientReducer::send_ready() {
  for (; next_ < buckets_.size() && buckets_[next_].missing <= 0; ++next_) {
    buckets_[next_].under_way =
        communicator_.begin_sum(buckets_[next_].gradient, "the sum of gradients");
  }
}

void GradientReducer::finish() {
  counting_ = false;
  for (size_t i = next_; i < buckets_.size(); ++i) {
    buckets_[i].missing = 0;
  }
  send_ready();
  for (Bucket& bucket : buckets_) {
    bucket.under_way->wait();
    bucket.under_way.reset();
  }
}

}  // namespace rwkv
