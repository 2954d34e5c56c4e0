// A fault that the undefined-behaviour sanitizer must find (tests/tools/sanitize.py); no part of the extension.
extern "C" int planted_wrap(int largest) { return largest + 1; }
