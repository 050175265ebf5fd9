#!/bin/sh
# Install the system packages that building the image and running it on a virtual Pi need: only those that are missing.
# For Debian 12 and newer and Raspberry Pi OS; run as root. Called by `make setup`.
set -eu

# one line each: why it is here
packages="
mmdebstrap arch-test debian-archive-keyring : the base root file system, from Debian's packages
dosfstools mtools e2fsprogs fdisk    : file systems and partition table, without loop devices
squashfs-tools cryptsetup-bin        : the root, and the tree of hashes that verifies it
zstd xz-utils kmod busybox-static binutils : compression, module lists, the initramfs' shell and libraries
device-tree-compiler                 : our overlays, and the virtual Pi's device tree
swig                                 : lgpio for the device's Python, which has no wheel
python3-venv                         : the virtual environment
bmap-tools                           : the tests compare our block map with bmaptool's
qemu-system-arm qemu-utils           : the virtual Pi
swtpm swtpm-tools                    : its TPM
libtpm2-pkcs11-1                     : a TPM for the simulated board
softhsm2                             : a token in the tests of signing
gnupg dpkg-dev                       : a signed archive of packages, for the tests
faketime                             : another clock, for the test that builds twice
mosquitto cpio                       : independent peers in the tests: a broker, an archiver
"
if [ "$(dpkg --print-architecture 2>/dev/null || true)" = arm64 ]; then
    packages="$packages
gcc libc6-dev : a compiler for the device"
else
    packages="$packages
qemu-user-static binfmt-support : runs the arm64 half of package installation
gcc-aarch64-linux-gnu libc6-dev-arm64-cross : a compiler for the device"
fi
wanted=$(printf '%s\n' "$packages" | sed 's/:.*//')
missing=""
for package in $wanted; do
    if [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ]; then
        missing="$missing $package"
    fi
done
if [ -z "$missing" ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "setup: this needs Debian or Raspberry Pi OS; missing here:$missing" >&2
    exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "setup: root is needed to install:$missing" >&2
    echo "Next: sudo make setup" >&2
    exit 2
fi
echo "Installing system packages (once):$missing"
apt-get update --quiet --quiet
# mosquitto is wanted as a program; nothing here shall start listening.
policy=/usr/sbin/policy-rc.d
made=""
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
    made=yes
fi
trap '[ -z "$made" ] || rm -f "$policy"' EXIT
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends $missing
