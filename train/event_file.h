// TensorBoard event files: scalars and texts of a run over its steps, which TensorBoard shows.
//
//   file   = record*
//   record = u64 length | u32 masked crc32c of the length | length bytes | u32 masked crc32c of
//   them masked = ((crc >> 15) | (crc << 17)) + 0xa282ead8, modulo 2^32
// All little-endian. The bytes of a record are a protobuf message; the first says the format's
// version, "brain.Event:2", the second that a session starts at a step. Of the messages we use
//   Event    1 f64 wall time, seconds since 1970; 2 int step; 3 file version; 5 Summary; 7 Session
//   Session  1 int status, 1 for a start
//   Summary  1 Value, repeated
//   Value    1 tag; 2 f32 simple value; 8 Tensor; 9 Metadata
//   Metadata 1 Plugin (1 its name); 4 int data class, 2 for a tensor
//   Tensor   1 int dtype (1 f32, 2 f64, 7 string); 2 Shape (2 Dim, repeated (1 int size));
//            4 its elements as bytes, or 5 f32, 6 f64, 8 strings, repeated
// Source: TensorFlow core/lib/io/record_writer.h; tensorboard/compat/proto/{event,summary,tensor,
// tensor_shape}.proto.
#pragma once

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/mapped_file.h"

namespace rwkv {

// Writes one file for each start of a run. Not safe for use by several threads at once.
class EventWriter {
 public:
  // Creates `folder` (RUN/tensorboard) if it is not there, and in it
  // events.out.tfevents.<time>.<host>.<pid> for a run that goes on after `resumed_step` (0: from
  // the start): TensorBoard then forgets what older files of the folder hold of later steps.
  // `time_s` is in seconds since 1970; the name has one that is above those of the older files
  // whatever the clock says, for TensorBoard reads them by name.
  // Throws std::runtime_error naming the file if that fails.
  EventWriter(const std::string& folder, int64_t resumed_step, double time_s);

  // Adds a point. Kept in memory until flush(), or until a few hundred of them have gathered.
  // `value` is stored as a float, whatever it is, NaN included.
  void scalar(std::string_view tag, int64_t step, double time_s, double value);
  // Adds a text, shown as it is: TensorBoard takes texts for Markdown, and so it is stored as a
  // block of code, each line indented by four spaces. What is not UTF-8 in it becomes U+FFFD.
  void text(std::string_view tag, int64_t step, double time_s, std::string_view text);
  // Hands all of it to the operating system. All three throw std::runtime_error naming the file if
  // writing fails.
  void flush();

  const std::string& path() const { return path_; }

 private:
  void add_record(std::string_view bytes);

  std::string path_;
  std::string buffer_;
  std::ofstream file_;
};

struct EventValue {
  std::string tag;
  std::optional<double> scalar;     // of a scalar
  std::optional<std::string> text;  // of a text, as it is stored: any bytes
};

// An event of any program. What is of another kind (images, histograms, graphs) comes without
// scalar and text, or without values; values without a tag are left out.
struct Event {
  double time_s = 0;  // since 1970
  int64_t step = 0;
  std::string file_version;  // of the first event of a file
  bool starts_session = false;
  std::vector<EventValue> values;
};

class EventReader {
 public:
  // Throws std::runtime_error naming the path if it cannot be opened.
  explicit EventReader(const std::string& path);

  // The next event, or nothing at the end. Throws std::runtime_error naming the path and the byte
  // at which a record starts whose checksum is wrong or that is no event. Takes at most
  // some forty times the memory of the record.
  std::optional<Event> next();
  // Once next() has returned nothing: bytes of a last record that is not all there, as a run leaves
  // that was killed or is writing now.
  uint64_t cut_bytes() const { return rest_.size(); }

 private:
  [[noreturn]] void fail(const std::string& what) const;

  MappedFile file_;
  std::span<const std::byte> rest_;
};

// Whether a file starts as an event file does: its first record's length has its checksum.
bool is_event_file(std::span<const std::byte> start);

}  // namespace rwkv
