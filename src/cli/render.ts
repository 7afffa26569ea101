import { formatBytes, formatDuration } from '../lib/units.js';
import type { Schemas } from './client.js';
import { formatFields, formatTable } from './table.js';
import { safeText } from './text.js';

type Run = Schemas['Run'];
type Finding = Schemas['CheckFinding'];

/** `2026-11-21 09:00:00Z`: UTC, to the second. */
export function formatTime(timestamp: string | null): string {
  return timestamp === null ? '-' : timestamp.replace('T', ' ').replace(/\.\d+Z$/, 'Z');
}

export function formatSource(source: Schemas['Disk']['source']): string {
  if (source === null) return '(known only from a repository)';
  switch (source.kind) {
    case 'nbd':
      return source.uri;
    case 'image':
      return `${source.path} (${source.format})`;
    case 'volume':
      return `volume ${source.volumeId}`;
    case 'push':
      return '(pushed by an agent)';
    case 'libvirt':
    case 'qemu':
      return `${source.kind}: ${source.target}`;
  }
}

function formatTarget(target: Schemas['TargetSpec']): string {
  switch (target.kind) {
    case 'nbd':
      return target.uri;
    case 'device':
      return target.path;
    case 'volume':
      return `volume ${target.volumeId}`;
    case 'file':
      return `${target.path} (${target.format})`;
  }
}

/** A run for people: what it was, how it ended, what came out. `diskNames` by id, as far as they are known. */
export function formatRun(run: Run, diskNames: ReadonlyMap<string, string> = new Map()): string {
  const nameOf = (disk: { diskId: string }): string => diskNames.get(disk.diskId) ?? disk.diskId;
  const fields: [string, string][] = [
    ['run', run.id],
    ['kind', run.kind],
    ['state', run.state + (run.isStalled ? ' (stalled)' : '')],
    ...(run.stage !== null && run.state === 'running' ? [['stage', run.stage] as [string, string]] : []),
    ...(run.attempt > 1 ? [['attempt', String(run.attempt)] as [string, string]] : []),
    ['created', formatTime(run.createdAt)],
    ['ended', formatTime(run.endedAt)],
    ...(run.startedAt !== null && run.endedAt !== null
      ? [['took', formatDuration(Date.parse(run.endedAt) - Date.parse(run.startedAt))] as [string, string]]
      : []),
  ];
  const progress = formatDisks(run, nameOf) + formatPush(run);
  return formatFields(fields) + progress + formatResult(run, nameOf) + formatRunError(run);
}

type NameOf = (disk: { diskId: string }) => string;

function formatDisks(run: Run, nameOf: NameOf): string {
  const { disks } = run.progress;
  if (disks.length === 0) return '';
  const table = formatTable(disks, [
    { title: 'DISK', value: nameOf },
    { title: 'METHOD', value: (disk) => disk.method ?? '-' },
    { title: 'READ', value: (disk) => formatBytes(disk.bytesRead), align: 'right' },
    { title: 'WRITTEN', value: (disk) => formatBytes(disk.bytesWritten), align: 'right' },
    { title: 'ZEROED', value: (disk) => formatBytes(disk.bytesZeroed), align: 'right' },
    { title: 'REASON', value: (disk) => disk.reason?.sentence ?? '' },
  ]);
  return `\n${table}`;
}

/** What the agent of a pushed backup has to do; when the run has ended nothing of it is there any more. */
function formatPush({ state, progress: { push } }: Run): string {
  if (push === null || state !== 'running') return '';
  const table = formatTable(push.disks, [
    { title: 'PUSHED DISK', value: (disk) => disk.diskName },
    { title: 'METHOD', value: (disk) => disk.method },
    { title: 'SINCE', value: (disk) => disk.changeIdFrom ?? '-' },
    { title: 'COMPLETE', value: (disk) => (disk.isCompleted ? 'yes' : 'no') },
    { title: 'EXPORT', value: (disk) => disk.uris[0] ?? '-' },
    { title: 'REASON', value: (disk) => disk.reason.sentence },
  ]);
  return `\n${table}An agent that says nothing for ${formatDuration(push.silenceMs)} fails the run.\n`;
}

function formatResult({ result }: Run, nameOf: NameOf): string {
  switch (result?.kind) {
    case undefined:
      return '';
    case 'backup':
      return `\nPoint ${safeText(result.pointId)} is committed.\n`;
    case 'restore':
      return `\n${formatTable(result.disks, [
        { title: 'DISK', value: nameOf },
        { title: 'TARGET', value: (disk) => formatTarget(disk.target) },
        { title: 'WRITTEN', value: (disk) => formatBytes(disk.bytesWritten), align: 'right' },
        { title: 'DAMAGED', value: (disk) => formatBytes(disk.damagedBytes), align: 'right' },
      ])}${formatMachine(result.machine)}`;
    case 'check':
      return formatReport(result.report);
    case 'rescan':
      return `\nFound ${result.vms} machines with ${result.points} points.\n`;
    case 'delete':
      return `\nFreed ${formatBytes(result.freedBytes)}.\n`;
    case 'materialize':
    case 'attach-volume':
    case 'detach-volume':
      return `\n${formatOperationResult(result)}`;
  }
}

type OperationResult = Extract<
  Schemas['RunResult'],
  { kind: 'materialize' | 'attach-volume' | 'detach-volume' }
>;

/** What came of an operation on an export or a volume. */
export function formatOperationResult(result: OperationResult): string {
  switch (result.kind) {
    case 'materialize':
      return `${safeText(result.imagePath)} (${formatBytes(result.fileBytes)}) stands alone: the point is not needed for it.\n`;
    case 'attach-volume':
      return `Volume ${safeText(result.volumeId)} is attached at ${safeText(result.devicePath)}.\n`;
    case 'detach-volume':
      return `Volume ${safeText(result.volumeId)} is detached.\n`;
  }
}

function formatMachine(machine: Schemas['RestoredMachine'] | null): string {
  if (machine === null) return '';
  const started = machine.isStarted ? 'started' : 'not started';
  return `Restored as ${safeText(machine.name)} (${safeText(machine.uuid)}), ${started}.\n`;
}

function formatReport(report: Schemas['CheckReport']): string {
  const verified =
    report.bytesVerified > 0 ? `, ${formatBytes(report.bytesVerified)} compared with hashes` : '';
  const looked = `\nLooked at ${report.points} points of ${report.vms} machines (${report.layers} layers${verified}).\n`;
  if (report.findings.length === 0) return `${looked}Nothing was found.\n`;
  const findings = formatTable<Finding>(report.findings, [
    { title: 'SEVERITY', value: (finding) => finding.severity },
    { title: 'CODE', value: (finding) => finding.code },
    { title: 'MESSAGE', value: (finding) => finding.message },
    { title: 'FILE', value: (finding) => finding.file ?? '' },
  ]);
  const damaged =
    report.damagedPoints.length === 0
      ? ''
      : `Points not to be trusted: ${report.damagedPoints.map(safeText).join(', ')}\n`;
  return `${looked}${findings}${damaged}`;
}

function formatRunError({ error }: Run): string {
  if (error === null) return '';
  return `\n${error.code}: ${safeText(error.message)}\n${safeText(error.remedy)}\n`;
}
