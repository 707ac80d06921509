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
    size_t store;
    int64_t begin, end;
    Bucket bucket;
  };
  std::vector<Range> ranges;
  for (size_t store = 0; store < gradients.size(); ++store) {
    const at::Tensor& gradient = gradients[store];
    const int64_t step = std::max<int64_t>(bucket_bytes / gradient.element_size(), 1);
    for (int64_t begin = 0; begin < gradient.numel(); begin += step) {
      const int64_t end = std::min(begin + step, gradient.numel());
      Bucket bucket;
      bucket.gradient = gradient.slice(0, begin, end);
      bucket.first_place = static_cast<int64_t>(places.size());
      ranges.push_back({store, begin, end, std::move(bucket)});
    }
  }
  for (Range& range : ranges) {
    for (size_t place = 0; place < places.size(); ++place) {
      const GradientPlace& at = places[place];
      if (at.store == range.store && at.begin < range.end && at.end > range.begin) {
        range.bucket.first_place = std::min(range.bucket.first_place, static_cast<int64_t>(place));
        ++range.bucket.num_places;
      }
    }
  }
  // Parameters are in the model's order, which backward walks from its end.
  std::stable_sort(ranges.begin(), ranges.end(), [](const Range& x, const Range& y) {
    return x.bucket.first_place > y.bucket.first_place;
  });
  buckets_of_place_.resize(places.size());
  for (Range& range : ranges) {
    for (size_t place = 0; place < places.size(); ++place) {
      const GradientPlace& at = places[place];
      if (at.store == range.store && at.begin < range.end && at.end > range.begin) {
        buckets_of_place_[place].push_back(buckets_.size());
      }
    }
    buckets_.push_back(std::move(range.bucket));
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
