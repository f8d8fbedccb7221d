// Preloaded, it refuses memory files, as some sandboxes do.
#include <cerrno>

extern "C" int memfd_create(const char* /*name*/, unsigned /*flags*/) {
  errno = EPERM;
  return -1;
}
