/** RESTORE.md of a new repository: what somebody needs who has the files and nothing else. */
export const RESTORE_GUIDE = `# Restoring from this directory without Holdfast

This directory is a Holdfast repository. Every recovery point can be restored with stock QEMU tools
(Debian: package qemu-utils). Work on a copy or a read-only mount if you can; never write to the
files under vms/.

1. Find the machine: each vms/<vm-id>/vm.json has its name and disks.
2. Find the recovery point: each vms/<vm-id>/points/<point-id>.json is one. "capturedAt" is the
   instant the disks were read, "sequence" their order. (Files ending in .state.json are not points.)
3. For the disk, take "diskId", "layerId" and "sizeBytes" from the point's "disks" list.
4. Convert. The file names its parents itself, by relative names in the same directory:

       cd vms/<vm-id>/layers/<disk-id>
       qemu-img convert -f qcow2 -O raw <layer-id>.qcow2 /somewhere/disk.raw
       truncate -s <sizeBytes> /somewhere/disk.raw

   (QCOW2 holds whole sectors of 512 bytes; the truncate brings back the exact size.)
   For a QCOW2 file instead: -O qcow2. Always give -f qcow2; never let a tool guess the format.

5. qemu-img does not compare what it reads with the checksums that were taken at backup.
   "holdfast-rescue restore" does both; it needs this directory only, no daemon and no database.

If a file .partial-* stands beside the layers it belongs to a backup that did not end; ignore it.
The machine's configuration (domain XML and the like) is in vms/<vm-id>/config/<point-id>/.
`;
