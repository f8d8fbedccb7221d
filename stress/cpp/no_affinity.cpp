// Preloaded, it refuses to bind threads to CPUs, as some sandboxes do.
#include <pthread.h>
#include <sched.h>

#include <cerrno>

extern "C" int sched_setaffinity(pid_t /*pid*/, size_t /*size*/,
                                 const cpu_set_t* /*set*/) noexcept {
  errno = EPERM;
  return -1;
}

extern "C" int pthread_setaffinity_np(pthread_t /*thread*/, size_t /*size*/,
                                      const cpu_set_t* /*set*/) noexcept {
  return EPERM;
}
