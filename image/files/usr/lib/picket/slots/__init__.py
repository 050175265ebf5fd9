"""Root's part of an OS update: writes the slot that does not run, and tells the firmware which one to boot.

The initramfs runs it, too: to judge an authorisation for factory mode.

It belongs to the image, is run by systemd for each connection to /run/picket-slots.sock (`python3 -I -S`, standard
library only), and takes nothing on trust: what the agent passes is a file descriptor, and what is in it must be signed.

    faults      what can go wrong, by a short code
    bundle      the signed tar of one slot: parsed strictly, judged purely
    signature   ssh-keygen says who signed
    board       which image runs, on which board, and where its partitions are
    fat         finds the one sector of a small file in a FAT file system
    medium      every write: to partitions, and to files that must survive a power cut
    state       /data/system: what the slots hold, what is on trial, the floor
    control     where the choice of the slot is kept, and how one try is made
    slots       the verbs
    factory_mode  who may take a sealed unit back, for one boot
    service     the socket and the command line
"""
