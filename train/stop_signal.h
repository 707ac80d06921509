// SIGTERM, SIGINT and SIGHUP (a lost terminal) as a wish to stop: a run saves and ends instead of
// dying.
#pragma once

namespace rwkv {

// From now on these signals are only noted; a second SIGINT ends the program at once.
void catch_stop_signals();

// The signal that was noted, or 0.
int stop_signal();

}  // namespace rwkv
