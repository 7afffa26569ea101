import { formatBytes } from '../lib/units.js';
import type { Schemas } from './client.js';
import { formatSource, formatTime } from './render.js';
import { formatFields, formatTable, type Column } from './table.js';
import { safeText } from './text.js';

type Vm = Schemas['Vm'];
type Disk = Schemas['Disk'];
type Machine = Schemas['Machine'];

/** `running`, `off`, …; `gone` when the hypervisor knows it no more, `-` where none is asked. */
function stateOf({ machine }: Vm): string {
  if (machine === null) return '-';
  return machine.isPresent ? machine.state : 'gone';
}

function isBackedUp({ facts }: Disk): boolean {
  return facts === null || (facts.isPresent && facts.skip === null);
}

/** One line for each machine. Counts and sizes are of the disks that backups take. */
export const VM_COLUMNS: readonly Column<Vm>[] = [
  { title: 'ID', value: (vm) => vm.id },
  { title: 'NAME', value: (vm) => vm.name },
  { title: 'STATE', value: stateOf },
  {
    title: 'DISKS',
    value: ({ disks }) => {
      const taken = disks.filter(isBackedUp).length;
      return taken === disks.length ? String(taken) : `${taken} of ${disks.length}`;
    },
    align: 'right',
  },
  {
    title: 'SIZE',
    value: ({ disks }) =>
      formatBytes(disks.filter(isBackedUp).reduce((sum, disk) => sum + disk.sizeBytes, 0)),
    align: 'right',
  },
];

/** All that is known of a machine. */
export function formatVm(vm: Vm): string {
  const { machine } = vm;
  const fields = formatFields([
    ['id', vm.id],
    ['name', vm.name],
    ['added', formatTime(vm.createdAt)],
    ...(machine === null ? [] : machineFields(vm, machine)),
  ]);
  const records = machine === null ? '' : formatChangeRecords(vm, machine);
  return `${fields}\n${formatVmDisks(vm.disks)}${records}`;
}

function machineFields(vm: Vm, { source, seenAt }: Machine): [string, string][] {
  const where: [string, string][] =
    source.kind === 'libvirt'
      ? [
          ['libvirt', source.uri],
          ['uuid', source.uuid],
        ]
      : [
          ['qmp', source.socket],
          ['agent', source.agentSocket ?? '-'],
        ];
  return [...where, ['state', stateOf(vm)], ['seen', formatTime(seenAt)]];
}

/** Disks that discovery found are shown with what it found, those recorded by hand with their source. */
export function formatVmDisks(disks: readonly Disk[]): string {
  const isDiscovered = disks.some(({ facts }) => facts !== null);
  return formatTable(disks, [
    { title: '#', value: (disk) => String(disk.number), align: 'right' },
    { title: 'DISK', value: (disk) => disk.name },
    { title: 'ID', value: (disk) => disk.id },
    { title: 'SIZE', value: (disk) => formatBytes(disk.sizeBytes), align: 'right' },
    ...(isDiscovered ? DISCOVERED_COLUMNS : RECORDED_COLUMNS),
  ]);
}

const RECORDED_COLUMNS: readonly Column<Disk>[] = [
  {
    title: 'TRACKING',
    value: ({ source }) => (source === null || source.kind === 'push' ? '-' : source.changeTracking),
  },
  { title: 'SOURCE', value: (disk) => formatSource(disk.source) },
];

const DISCOVERED_COLUMNS: readonly Column<Disk>[] = [
  { title: 'TARGET', value: ({ facts }) => facts?.target ?? '-' },
  { title: 'SERIAL', value: ({ facts }) => facts?.serial ?? '-' },
  { title: 'FORMAT', value: ({ facts }) => facts?.format ?? '-' },
  { title: 'BACKED UP', value: ({ facts }) => (facts === null ? 'yes' : backedUp(facts)) },
  { title: 'INCREMENTAL', value: ({ facts }) => (facts === null ? '-' : incremental(facts)) },
  { title: 'WHERE', value: ({ facts, source }) => facts?.location ?? formatSource(source) },
];

function backedUp({ isPresent, skip }: Schemas['DiskFacts']): string {
  if (!isPresent) return 'no: gone from the machine';
  return skip === null ? 'yes' : `no: ${skip.sentence}`;
}

function incremental({ incremental: { isPossible, reason } }: Schemas['DiskFacts']): string {
  if (isPossible) return 'yes';
  return reason === null ? 'no' : `no: ${reason}`;
}

function formatChangeRecords(vm: Vm, { source, changeRecords }: Machine): string {
  if (changeRecords.length === 0) return '';
  const what = source.kind === 'libvirt' ? 'checkpoints' : 'bitmaps';
  const table = formatTable(changeRecords, [
    { title: what.toUpperCase(), value: (record) => record.name },
    { title: 'POINT', value: (record) => record.pointId ?? '-' },
    { title: 'STATE', value: (record) => (record.isBroken ? 'broken' : 'ok') },
  ]);
  const why = source.kind === 'libvirt' ? 'libvirt does not undefine a domain that has checkpoints. ' : '';
  return `\n${table}${why}Remove those of this appliance: holdfast vm release ${safeText(vm.id)}\n`;
}

/** What a release did. Records of others are never removed. */
export function formatReleased(vm: Vm, { removed, kept }: Schemas['ReleasedRecords']): string {
  const list = (names: readonly string[]): string => names.map((name) => `  ${safeText(name)}\n`).join('');
  const name = safeText(vm.name);
  const done =
    removed.length === 0
      ? `${name} had no change records of this appliance.\n`
      : `Removed from ${name}; the next backup reads all of its disks:\n${list(removed)}`;
  return kept.length === 0 ? done : `${done}Left alone, not of this appliance:\n${list(kept)}`;
}
