#include "data/sentencepiece_training.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <unordered_map>

#include <sentencepiece_trainer.h>

#include "data/atomic_file.h"
#include "data/sentencepiece_text.h"
#include "data/text_reader.h"

namespace rwkv {
namespace {

constexpr int64_t kMinVocabSize = 300;
constexpr int64_t kMaxVocabSize = 1'000'000;  // the number of candidates sentencepiece starts from
// Past this many bytes of text, counts could overflow sentencepiece's 32-bit path.
constexpr size_t kLargeCorpusBytes = size_t{1} << 29;
// The longest stretch to learn from: about sentencepiece's own default. Its BPE trainer shifts the
// place of a character in its word left by 16 bits of an int, and so writes outside its tables from
// place 32,768 on; its unigram trainer ends the process when a sum over a long line is no number.
constexpr size_t kMaxStretchBytes = 4096;

// A uniform sample of at most `limit` lines of a stream whose length is not known (Vitter's
// algorithm R). The draws are written out, for std::uniform_int_distribution may differ between
// standard libraries and the same seed must give the same model.
class LineSample {
 public:
  LineSample(size_t limit, uint32_t seed) : limit_(limit), random_(seed) {}

  void add(std::string_view line) {
    ++seen_;
    if (lines_.size() < limit_) {
      lines_.emplace_back(line);
    } else if (const uint64_t place = random_() % seen_; place < limit_) {
      lines_[place] = line;
    }
  }
  const std::vector<std::string>& lines() const { return lines_; }

 private:
  size_t limit_;
  std::mt19937_64 random_;
  uint64_t seen_ = 0;
  std::vector<std::string> lines_;
};

// Adds the stretches of `line` that sentencepiece can learn from. It takes U+2585 as a sign of its
// own and drops lines that hold one, and a tab as a border that no token crosses. Stretches are cut
// here and not in the tokenizer too: where it cuts decides the ids of text.
void add_line(std::string_view line, LineSample& sample) {
  constexpr std::string_view kReserved = "\xE2\x96\x85";
  const auto add_without_reserved = [&](std::string_view text) {
    while (!text.empty()) {
      const size_t border = std::min(text.find('\t'), text.find(kReserved));
      std::string_view stretch = text.substr(0, border);
      text.remove_prefix(stretch.size());
      while (const size_t length =
                 next_line_part(stretch, Tokenizer::TextEnd::kFinal, kMaxStretchBytes)) {
        sample.add(stretch.substr(0, length));
        stretch.remove_prefix(length);
      }
      if (!text.empty()) {
        text.remove_prefix(text[0] == '\t' ? 1 : kReserved.size());
      }
    }
  };
  split_plain_text(line, add_without_reserved, [](unsigned char) {});
}

LineSample read_lines(const SentencepieceTraining& training) {
  LineSample sample(static_cast<size_t>(training.max_lines), training.seed);
  TextReader reader(training.text_files, {.jsonl_key = training.jsonl_key});
  std::string pending;  // the start of a line that the next piece goes on with
  for (TextPiece piece; reader.next(piece);) {
    pending += piece.text;
    const auto end = piece.ends_document ? Tokenizer::TextEnd::kFinal : Tokenizer::TextEnd::kMore;
    std::string_view rest = pending;
    while (const size_t length = next_line_part(rest, end)) {
      if (rest[0] != '\n') {
        add_line(rest.substr(0, length), sample);
      }
      rest.remove_prefix(length);
    }
    pending.erase(0, pending.size() - rest.size());
  }
  return sample;
}

class LineIterator final : public sentencepiece::SentenceIterator {
 public:
  explicit LineIterator(const std::vector<std::string>& lines) : lines_(lines) {}
  bool done() const override { return next_ == lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::vector<std::string>& lines_;
  size_t next_ = 0;
};

std::unordered_map<std::string, std::string> trainer_options(const SentencepieceTraining& training,
                                                             size_t corpus_bytes) {
  return {
      {"model_type", training.kind == SentencepieceKind::kBpe ? "bpe" : "unigram"},
      {"vocab_size", std::to_string(training.vocab_size)},
      // What makes the model lossless (sentencepiece_tokenizer.h).
      {"normalization_rule_name", "identity"},
      {"add_dummy_prefix", "false"},
      {"remove_extra_whitespaces", "false"},
      {"byte_fallback", "true"},
      {"user_defined_symbols", "\n"},
      // <unk> must exist; a document needs an end, not a beginning.
      {"unk_id", "0"},
      {"eos_id", "1"},
      {"bos_id", "-1"},
      {"pad_id", "-1"},
      // A digit a token, as World does nearly; runs of spaces may become tokens, for code's sake.
      {"split_digits", "true"},
      {"allow_whitespace_only_pieces", "true"},
      {"max_sentence_length", std::to_string(kMaxStretchBytes)},
      // Sums are split by thread: the number must not depend on the machine.
      {"num_threads", "16"},
      {"train_extremely_large_corpus", corpus_bytes > kLargeCorpusBytes ? "true" : "false"},
      {"minloglevel", "2"},
  };
}

// The number in `text` after `mark`, as written; empty if `mark` is not there.
std::string number_after(const std::string& text, const std::string& mark) {
  const size_t found = text.find(mark);
  if (found == std::string::npos) {
    return "";
  }
  const size_t begin = found + mark.size();
  return text.substr(begin, text.find_first_not_of("0123456789", begin) - begin);
}

[[noreturn]] void fail(const SentencepieceTraining& training, const std::string& reason) {
  const std::string size = std::to_string(training.vocab_size);
  if (const std::string largest = number_after(reason, "value <= "); !largest.empty()) {
    const std::string advice = std::stol(largest) < kMinVocabSize
                                   ? ", too few for a model; use more text"
                                   : "; use at most that, or more text";
    throw std::invalid_argument("vocab_size = " + size +
                                " is too large for this corpus, which is enough for " + largest +
                                advice);
  }
  if (const std::string needed = number_after(reason, size + " vs "); !needed.empty()) {
    throw std::invalid_argument("vocab_size = " + size +
                                " is too small for the different characters of this corpus; use " +
                                needed + " or more");
  }
  throw std::runtime_error(training.model_path + ": sentencepiece could not be trained: " + reason);
}

void validate(const SentencepieceTraining& training) {
  if (training.vocab_size < kMinVocabSize || training.vocab_size > kMaxVocabSize) {
    throw std::invalid_argument("vocab_size = " + std::to_string(training.vocab_size) +
                                ", expected " + std::to_string(kMinVocabSize) + " .. " +
                                std::to_string(kMaxVocabSize));
  }
  if (training.max_lines < 1) {
    throw std::invalid_argument("max_lines = " + std::to_string(training.max_lines) +
                                ", expected 1 or more");
  }
}

}  // namespace

void train_sentencepiece(const SentencepieceTraining& training) {
  validate(training);
  // Opened first: a folder that cannot be written to should not cost an hour of training.
  AtomicFile file(training.model_path);
  const LineSample sample = read_lines(training);
  if (sample.lines().empty()) {
    throw std::runtime_error(
        training.text_files[0] +
        (training.text_files.size() > 1 ? " and the other files hold" : " holds") +
        " no text to train on");
  }
  size_t corpus_bytes = 0;
  for (const std::string& line : sample.lines()) {
    corpus_bytes += line.size();
  }
  LineIterator lines(sample.lines());
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      trainer_options(training, corpus_bytes), &lines, &model);
  if (!status.ok()) {
    fail(training, status.ToString());
  }
  file.write(model);
  file.commit();
}

}  // namespace rwkv
