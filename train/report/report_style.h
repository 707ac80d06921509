// What every report page holds beside its content: the style sheet, and the script by which a chart
// is read under the pointer. Without the script the page lacks nothing else.
#pragma once

#include <string_view>

namespace rwkv {

// Eight colours, c0 .. c7 (and "broken" for lines of the same colours again), that stay apart for
// the colour-blind (after Okabe and Ito, jfly.uni-koeln.de/color), each lighter on a dark page.
extern const std::string_view kReportStyle;
extern const std::string_view kReportScript;

}  // namespace rwkv
