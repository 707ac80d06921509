#include "data/tokenize_corpus.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <future>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/number_text.h"

namespace rwkv {
namespace {

constexpr std::chrono::milliseconds kProgressInterval{250};

// Text that one thread encodes at a time: enough that starting a thread for it costs nothing
// beside.
constexpr size_t kBatchBytes = size_t{1} << 20;

// Text that may wait for a place to cut: as much as a row of .jsonl may have. Encoding it takes
// some tens of times the memory.
constexpr size_t kMaxHeldBytes = size_t{64} << 20;

// Documents that came whole, and where each ends.
struct TextBatch {
  std::string text;
  std::vector<size_t> ends;
};

struct EncodedBatch {
  std::vector<int32_t> ids;
  std::vector<size_t> ends;
};

EncodedBatch encode_batch(const Tokenizer& tokenizer, const TextBatch& batch) {
  EncodedBatch encoded;
  size_t begin = 0;
  for (const size_t end : batch.ends) {
    tokenizer.encode_part(std::string_view(batch.text).substr(begin, end - begin),
                          Tokenizer::TextEnd::kFinal,
                          encoded.ids);
    encoded.ends.push_back(encoded.ids.size());
    begin = end;
  }
  return encoded;
}

// Encodes documents on several threads at once, and writes them in the order in which they came.
class ParallelEncoder {
 public:
  ParallelEncoder(const Tokenizer& tokenizer, BinidxWriter& writer, size_t threads)
      : tokenizer_(tokenizer), writer_(writer), threads_(std::max<size_t>(threads, 1)) {}

  void encode(std::string_view document) {
    batch_.text += document;
    batch_.ends.push_back(batch_.text.size());
    if (batch_.text.size() >= kBatchBytes) {
      start_batch();
    }
  }

  // Writes all documents that were given so far.
  void finish() {
    if (!batch_.ends.empty()) {
      start_batch();
    }
    while (!running_.empty()) {
      write_oldest();
    }
  }

 private:
  void start_batch() {
    if (running_.size() == threads_) {
      write_oldest();
    }
    running_.push_back(std::async(std::launch::async, [this, batch = std::exchange(batch_, {})] {
      return encode_batch(tokenizer_, batch);
    }));
  }

  void write_oldest() {
    const EncodedBatch encoded = running_.front().get();
    running_.pop_front();
    size_t begin = 0;
    for (const size_t end : encoded.ends) {
      writer_.add_tokens(std::span(encoded.ids).subspan(begin, end - begin));
      writer_.end_document();
      begin = end;
    }
  }

  const Tokenizer& tokenizer_;
  BinidxWriter& writer_;
  const size_t threads_;
  TextBatch batch_;
  std::deque<std::future<EncodedBatch>> running_;  // oldest first; destroyed, each is waited for
};

// Encodes a document that comes in pieces, and holds what waits for the next piece.
class PieceEncoder {
 public:
  PieceEncoder(const Tokenizer& tokenizer, BinidxWriter& writer)
      : tokenizer_(tokenizer), writer_(writer) {}

  bool in_document() const { return in_document_; }

  // `path` is for the error text.
  void encode(const TextPiece& piece, const std::string& path) {
    in_document_ = !piece.ends_document;
    // Most pieces meet nothing held back and are encoded where they lie.
    std::string_view text = piece.text;
    if (!held_.empty()) {
      held_ += piece.text;
      text = held_;
    }
    ids_.clear();
    const auto end = piece.ends_document ? Tokenizer::TextEnd::kFinal : Tokenizer::TextEnd::kMore;
    const size_t done = tokenizer_.encode_part(text, end, ids_);
    writer_.add_tokens(ids_);
    if (piece.ends_document) {
      held_.clear();
      writer_.end_document();
    } else if (held_.empty()) {
      held_ = text.substr(done);
    } else {
      held_.erase(0, done);
    }
    if (held_.size() > kMaxHeldBytes) {
      throw std::runtime_error(path + ": more than " + grouped(kMaxHeldBytes) +
                               " bytes of a document without a place where the tokenizer " +
                               tokenizer_.identity() +
                               " can cut it, expected line ends; break its lines, or make a .jsonl "
                               "file with a document a row");
    }
  }

 private:
  const Tokenizer& tokenizer_;
  BinidxWriter& writer_;
  std::string held_;
  std::vector<int32_t> ids_;
  bool in_document_ = false;
};

}  // namespace

TokenizerRecord record_of(const Tokenizer& tokenizer) {
  return {.identity = tokenizer.identity(),
          .vocab_size = tokenizer.vocab_size(),
          .end_of_document = tokenizer.end_of_document(),
          .text_bytes = 0};
}

TokenizeResult tokenize_corpus(TextReader& reader,
                               const Tokenizer& tokenizer,
                               BinidxWriter& writer,
                               const std::function<void(const TokenizeProgress&)>& progress,
                               size_t threads) {
  using Clock = std::chrono::steady_clock;
  const auto report = [&] {
    if (progress) {
      progress({reader.bytes_read(), reader.bytes_total(), writer.num_tokens()});
    }
  };
  ParallelEncoder documents(tokenizer, writer, threads);
  PieceEncoder pieces(tokenizer, writer);
  int64_t text_bytes = 0;
  Clock::time_point last_report = Clock::now();
  for (TextPiece piece; reader.next(piece);) {
    text_bytes += static_cast<int64_t>(piece.text.size());
    if (piece.ends_document && !pieces.in_document()) {
      documents.encode(piece.text);
    } else {
      documents.finish();
      pieces.encode(piece, reader.path());
    }
    if (Clock::now() - last_report >= kProgressInterval) {
      report();
      last_report = Clock::now();
    }
  }
  documents.finish();
  writer.finish(text_bytes);
  report();
  return {writer.num_documents(), writer.num_tokens(), text_bytes};
}

}  // namespace rwkv
