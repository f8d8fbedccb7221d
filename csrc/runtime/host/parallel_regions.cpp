#include "runtime/host/parallel_regions.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

// Of libgomp's interface with the compilers: `body` is the region, `data` its variables.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads,
                              unsigned flags);

namespace neuron::runtime::host {
namespace {

#if defined(__x86_64__)
constexpr uint32_t kJumpSlot = R_X86_64_JUMP_SLOT;
#elif defined(__aarch64__)
constexpr uint32_t kJumpSlot = R_AARCH64_JUMP_SLOT;
#endif

/// In place of GOMP_parallel. A region run as a plain call finds itself in the implicit team of one
/// thread that OpenMP defines for code outside of any region; inside another region it would find
/// that one's team, so there it gets one of its own.
void parallel_region(void (*body)(void*), void* data, unsigned num_threads, unsigned flags) {
  if (num_threads <= 1 && omp_get_max_threads() == 1 && omp_get_level() == 0) {
    body(data);
  } else {
    GOMP_parallel(body, data, num_threads, flags);
  }
}

struct DynamicSection {
  const char* strings = nullptr;
  const ElfW(Sym) * symbols = nullptr;
  const ElfW(Rela) * jump_slots = nullptr;
  size_t jump_slots_size = 0;  ///< in bytes
  bool rela = false;
  bool read_only = false;  ///< the dynamic linker protected the table after filling it in
};

DynamicSection read_dynamic_section(const link_map& map) {
  DynamicSection found;
  for (const ElfW(Dyn)* entry = map.l_ld; entry->d_tag != DT_NULL; ++entry) {
    switch (entry->d_tag) {
      case DT_STRTAB:
        found.strings = reinterpret_cast<const char*>(entry->d_un.d_ptr);
        break;
      case DT_SYMTAB:
        found.symbols = reinterpret_cast<const ElfW(Sym)*>(entry->d_un.d_ptr);
        break;
      case DT_JMPREL:
        found.jump_slots = reinterpret_cast<const ElfW(Rela)*>(entry->d_un.d_ptr);
        break;
      case DT_PLTRELSZ:
        found.jump_slots_size = entry->d_un.d_val;
        break;
      case DT_PLTREL:
        found.rela = entry->d_un.d_val == DT_RELA;
        break;
      case DT_BIND_NOW:
        found.read_only = true;
        break;
      case DT_FLAGS:
        if ((entry->d_un.d_val & DF_BIND_NOW) != 0) found.read_only = true;
        break;
      case DT_FLAGS_1:
        if ((entry->d_un.d_val & DF_1_NOW) != 0) found.read_only = true;
        break;
      default:
        break;
    }
  }
  return found;
}

}  // namespace

void serve_parallel_regions([[maybe_unused]] void* library) {
#if defined(__x86_64__) || defined(__aarch64__)
  link_map* map = nullptr;
  if (::dlinfo(library, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return;
  const DynamicSection dynamic = read_dynamic_section(*map);
  if (dynamic.strings == nullptr || dynamic.symbols == nullptr || dynamic.jump_slots == nullptr ||
      !dynamic.rela || dynamic.read_only) {
    return;
  }
  const size_t count = dynamic.jump_slots_size / sizeof(ElfW(Rela));
  for (size_t i = 0; i < count; ++i) {
    const ElfW(Rela) & slot = dynamic.jump_slots[i];
    if (ELF64_R_TYPE(slot.r_info) != kJumpSlot) continue;
    const ElfW(Sym) & symbol = dynamic.symbols[ELF64_R_SYM(slot.r_info)];
    if (std::strcmp(dynamic.strings + symbol.st_name, "GOMP_parallel") != 0) continue;
    *reinterpret_cast<void (**)(void (*)(void*), void*, unsigned, unsigned)>(
        map->l_addr + slot.r_offset) = &parallel_region;
  }
#endif
}

}  // namespace neuron::runtime::host
