import { parseArgs } from 'node:util';
import { AppError } from '../../../src/lib/errors.js';

export interface BenchOptions {
  diskGib: number;
  dataGib: number;
  runs: number;
  jsonFile: string | undefined;
  directory: string;
  isMainWanted: boolean;
  isSparseWanted: boolean;
  isApiWanted: boolean;
  isLibvirtWanted: boolean;
}

export const USAGE = `Usage: scripts/bench [options]

Measures Holdfast beside nbdcopy and qemu-img convert on the same disk: a full backup, an incremental of
64 MiB changed in 1,000 places, and a restore to raw. Everything is written below one directory.

  --directory DIR   where (default /dev/shm); at least 8 GiB must be free
  --size-gib N      size of the disk (default 8)
  --data-gib N      incompressible data on it (default 2.3)
  --runs N          runs of each case (default 5)
  --json FILE       every single result as JSON
  --sparse          also: memory for a 4 TiB disk with a million extents
  --api             also: listing 50 out of 100,000 points
  --libvirt         also: a running machine beside virtnbdbackup
  --only-sparse, --only-api, --only-libvirt   that alone
  --help            this text

Holdfast is measured from the request to its API until the run is completed, which is after the commit;
its processes are the daemon and all that it starts (qemu-img, Redis). A tool's are
itself and the qemu-nbd it writes through. The server of the source is in neither.

The running machine is a real guest under emulation that writes 4 KiB, durably, all the time, to random
places of the disk that is backed up. Both tools back up the same domain in turn, each with its own checkpoints
(virtnbdbackup refuses to work beside another's): a full, and an incremental of 64 MiB in 1,000 places.
`;

export function parseBenchOptions(args: string[]): BenchOptions | 'help' {
  const { values } = parse(args);
  if (values.help === true) return 'help';
  const extras = ['sparse', 'api', 'libvirt'] as const;
  const onlyExtra = extras.some((extra) => values[`only-${extra}`] === true);
  const isWanted = (extra: (typeof extras)[number]): boolean =>
    values[extra] === true || values[`only-${extra}`] === true;
  return {
    diskGib: positive('--size-gib', values['size-gib'] ?? '8'),
    dataGib: positive('--data-gib', values['data-gib'] ?? '2.3'),
    runs: Math.round(positive('--runs', values.runs ?? '5')),
    jsonFile: values.json,
    directory: values.directory ?? '/dev/shm',
    isMainWanted: !onlyExtra,
    isSparseWanted: isWanted('sparse'),
    isApiWanted: isWanted('api'),
    isLibvirtWanted: isWanted('libvirt'),
  };
}

function parse(args: string[]) {
  try {
    return parseArgs({
      args,
      options: {
        directory: { type: 'string' },
        'size-gib': { type: 'string' },
        'data-gib': { type: 'string' },
        runs: { type: 'string' },
        json: { type: 'string' },
        sparse: { type: 'boolean' },
        api: { type: 'boolean' },
        'only-sparse': { type: 'boolean' },
        'only-api': { type: 'boolean' },
        libvirt: { type: 'boolean' },
        'only-libvirt': { type: 'boolean' },
        help: { type: 'boolean', short: 'h' },
      },
    });
  } catch (error) {
    throw new AppError('INVALID_INPUT', error instanceof Error ? error.message : String(error));
  }
}

function positive(name: string, text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value <= 0)
    throw new AppError('INVALID_INPUT', `${name} must be a number above 0`);
  return value;
}
