#include "data/tokenize_corpus.h"

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {
namespace {

constexpr std::chrono::milliseconds kProgressInterval{250};

// Encodes one document after the other from pieces, and holds what waits for the next piece.
class PieceEncoder {
 public:
  PieceEncoder(const Tokenizer& tokenizer, BinidxWriter& writer)
      : tokenizer_(tokenizer), writer_(writer) {}

  void encode(const TextPiece& piece) {
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
  }

 private:
  const Tokenizer& tokenizer_;
  BinidxWriter& writer_;
  std::string held_;
  std::vector<int32_t> ids_;
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
                               const std::function<void(const TokenizeProgress&)>& progress) {
  using Clock = std::chrono::steady_clock;
  const auto report = [&] {
    if (progress) {
      progress({reader.bytes_read(), reader.bytes_total(), writer.num_tokens()});
    }
  };
  PieceEncoder encoder(tokenizer, writer);
  int64_t text_bytes = 0;
  Clock::time_point last_report = Clock::now();
  for (TextPiece piece; reader.next(piece);) {
    text_bytes += static_cast<int64_t>(piece.text.size());
    encoder.encode(piece);
    if (Clock::now() - last_report >= kProgressInterval) {
      report();
      last_report = Clock::now();
    }
  }
  writer.finish(text_bytes);
  report();
  return {writer.num_documents(), writer.num_tokens(), text_bytes};
}

}  // namespace rwkv
