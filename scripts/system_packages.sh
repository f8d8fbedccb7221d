#!/usr/bin/env bash
# Makes sure that GoogleTest and OpenSSL's library are there, for the C++ unit tests and those of signatures.
# Installs them where that is possible without a question (root or passwordless sudo, and apt-get), else says what
# is missing.
# With --with-clang also clang, whose -Wthread-safety checks the locking; nothing else needs it.
set -euo pipefail

missing=()
[[ -e /usr/include/gtest/gtest.h || -e /usr/local/include/gtest/gtest.h ]] || missing+=(libgtest-dev)
crypto=$(compgen -G '/usr/lib*/libcrypto.so.3' || compgen -G '/usr/lib/*/libcrypto.so.3' || true)
[[ -n $crypto ]] || missing+=(libssl3)
if [[ "${1:-}" == --with-clang ]]; then
  command -v clang++ >/dev/null || missing+=(clang)
fi
((${#missing[@]})) || exit 0

as_root=()
if ((EUID != 0)); then
  as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
  echo "system_packages: missing: ${missing[*]}. Install with: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi

install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >"$log" 2>&1
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "system_packages: installing ${missing[*]}"
# Package lists may be absent or out of date: fetch them only when the first attempt fails.
if ! install; then
  "${as_root[@]}" apt-get update -qq </dev/null >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
  install || {
    cat "$log" >&2
    echo "system_packages: could not install ${missing[*]}" >&2
    exit 1
  }
fi
