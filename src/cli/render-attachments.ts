import { formatBytes } from '../lib/units.js';
import type { Schemas } from './client.js';
import { formatOperationResult, formatTime } from './render.js';
import { formatFields, formatTable, type Column } from './table.js';
import { safeText } from './text.js';

type Export = Schemas['Export'];
type Identity = Export['identity'];
type Volume = Schemas['Volume'];
type Operation = Schemas['Operation'];

/** How many of the daemon's events `export status` shows. */
const SHOWN_EVENTS = 10;

function formatSize(bytes: number | null): string {
  return bytes === null ? '-' : formatBytes(bytes);
}

function formatIdentity(identity: Identity): string {
  if (identity === null) return 'everybody who reaches the export daemon';
  return identity.kind === 'psk' ? `psk user ${identity.user}` : `certificate ${identity.distinguishedName}`;
}

function stateOf({ state, problem, materialization }: Export): string {
  if (problem !== null) return `${state}: ${problem.code}`;
  return materialization === null ? state : `${state}, materialize ${materialization.state}`;
}

export const EXPORT_COLUMNS: readonly Column<Export>[] = [
  { title: 'ID', value: (item) => item.id },
  { title: 'KIND', value: (item) => item.kind },
  { title: 'STATE', value: stateOf },
  { title: 'ACCESS', value: (item) => (item.isReadOnly ? 'read' : 'write') },
  { title: 'SIZE', value: (item) => formatSize(item.sizeBytes), align: 'right' },
  { title: 'EXPIRES', value: (item) => formatTime(item.expiresAt) },
  { title: 'WHERE', value: (item) => item.uris[0] ?? item.name },
];

/** All that is known of an export, with its addresses. */
export function formatExport(item: Export): string {
  const { materialization, problem } = item;
  const about: [string, string | null][] = [
    ['point', item.pointId],
    ['disk', item.diskId],
    ['volume', item.volumeId],
    ['run', item.runId],
  ];
  const fields = formatFields([
    ['id', item.id],
    ['name', item.name],
    ...about.flatMap(([name, value]) => (value === null ? [] : [[name, value] as const])),
    ['state', item.state],
    ['access', item.isReadOnly ? 'read' : 'read and write'],
    ['for', formatIdentity(item.identity)],
    ['size', formatSize(item.sizeBytes)],
    ['image', item.imagePath],
    ['created', formatTime(item.createdAt)],
    ['expires', item.expiresAt === null ? 'never' : formatTime(item.expiresAt)],
    ...(materialization === null
      ? []
      : [['materialize', `${materialization.state} (operation ${materialization.runId})`] as const]),
    ...item.uris.map((uri) => ['uri', uri] as const),
  ]);
  if (problem === null) return fields;
  return `${fields}\n${problem.code}: ${safeText(problem.message)}\n${safeText(problem.remedy)}\n`;
}

/** Lines to paste into a shell of whoever uses the export; empty while it is not served. */
export function formatExportExample(item: Export): string {
  const uri = item.uris[0];
  if (uri === undefined) return '';
  const probe = `nbdinfo ${quote(withCredentials(uri, item.identity))}`;
  return `\nTry it:\n  ${probe}\n  ${qemuExample(uri, item)}\n`;
}

/** One word of a POSIX shell. */
function quote(text: string): string {
  return `'${safeText(text).replaceAll("'", String.raw`'\''`)}'`;
}

/** The URI as libnbd takes it, with the place where the client keeps its credentials. */
function withCredentials(uri: string, identity: Identity): string {
  if (!uri.startsWith('nbds')) return uri;
  const join = uri.includes('?') ? '&' : '?';
  if (identity?.kind === 'x509') return `${uri}${join}tls-certificates=/etc/pki/holdfast`;
  const user = identity?.user ?? 'USER';
  return `${uri.replace('://', `://${user}@`)}${join}tls-psk-file=/etc/holdfast/keys.psk`;
}

/** The start of a machine from the export. A TLS client of QEMU reads `keys.psk`, or certificates, in a directory. */
function qemuExample(uri: string, { isReadOnly, identity }: Export): string {
  const access = isReadOnly ? ',readonly=on' : '';
  if (!uri.startsWith('nbds')) {
    return `qemu-system-x86_64 -m 2G -drive ${quote(`file=${uri},format=raw,if=virtio${access}`)}`;
  }
  const { hostname, port, pathname } = new URL(uri);
  const credentials =
    identity?.kind === 'x509'
      ? 'tls-creds-x509,id=tls0,endpoint=client,dir=/etc/pki/holdfast'
      : `tls-creds-psk,id=tls0,endpoint=client,dir=/etc/holdfast,username=${identity?.user ?? 'USER'}`;
  const server = `driver=nbd,node-name=disk0,server.type=inet,server.host=${hostname.replaceAll(/[[\]]/g, '')},server.port=${port}`;
  const node = `${server},export=${pathname.slice(1)},tls-creds=tls0${isReadOnly ? ',read-only=on' : ''}`;
  return `qemu-system-x86_64 -m 2G -object ${quote(credentials)} -blockdev ${quote(node)} -device virtio-blk-pci,drive=disk0`;
}

type Status = NonNullable<Schemas['ExportDaemon']['status']>;

/** The export daemon: whether it runs, where it listens, what it does not serve and why, what happened last. */
export function formatExportDaemon({ isRunning, status, problem }: Schemas['ExportDaemon']): string {
  const trouble =
    problem === null ? '' : `\n${problem.code}: ${safeText(problem.message)}\n${safeText(problem.remedy)}\n`;
  if (status === null) return `${formatFields([['state', isRunning ? 'running' : 'not running']])}${trouble}`;
  const served = status.files.filter(({ state }) => state === 'served').length;
  const fields = formatFields([
    ['state', isRunning ? 'running' : 'not running; this is its last word'],
    ['process', String(status.pid)],
    ['started', formatTime(status.startedAt)],
    ['directory', status.exportsDirectory],
    ['read', `${status.generation} times, last ${formatTime(status.appliedAt)}`],
    ['exports', `${served} served, ${status.files.length - served} failed`],
  ]);
  return `${fields}\n${formatListeners(status)}${formatFiles(status)}${formatEvents(status)}${trouble}`;
}

function formatListeners({ listeners }: Status): string {
  return formatTable(listeners, [
    { title: 'LISTENER', value: (item) => item.id },
    {
      title: 'ADDRESS',
      value: ({ address }) => (address.kind === 'tcp' ? `${address.host}:${address.port}` : address.path),
    },
    { title: 'TLS', value: (item) => item.tls },
    { title: 'STATE', value: (item) => item.state },
    { title: 'RESTARTS', value: (item) => String(item.restarts), align: 'right' },
    { title: 'ERROR', value: ({ error }) => (error === null ? '' : `${error.code}: ${error.message}`) },
  ]);
}

function formatFiles({ files }: Status): string {
  const failed = files.filter(({ state }) => state === 'failed');
  if (failed.length === 0) return '';
  return `\n${formatTable(failed, [
    { title: 'FAILED FILE', value: (item) => item.file },
    { title: 'EXPORT', value: (item) => item.name ?? '-' },
    { title: 'REASON', value: ({ error }) => (error === null ? '-' : `${error.code}: ${error.message}`) },
  ])}`;
}

function formatEvents({ events }: Status): string {
  if (events.length === 0) return '';
  return `\n${formatTable(events.slice(-SHOWN_EVENTS), [
    { title: 'AT', value: (event) => formatTime(event.at) },
    { title: 'EVENT', value: (event) => event.kind },
    { title: 'LISTENER', value: (event) => event.listener ?? '-' },
    { title: 'MESSAGE', value: (event) => event.message },
  ])}`;
}

function volumeState({ mapping, problem }: Volume): string {
  const state = mapping === null ? 'detached' : 'attached';
  return problem === null ? state : `${state}: ${problem.code}`;
}

export const VOLUME_COLUMNS: readonly Column<Volume>[] = [
  { title: 'ID', value: (volume) => volume.id },
  { title: 'NAME', value: (volume) => volume.name },
  { title: 'STATE', value: volumeState },
  { title: 'DEVICE', value: (volume) => volume.devicePath ?? '-' },
  { title: 'SIZE', value: (volume) => formatBytes(volume.sizeBytes), align: 'right' },
  { title: 'IDENTITY', value: (volume) => volume.identity },
];

export const DEVICE_COLUMNS: readonly Column<Schemas['FoundDevice']>[] = [
  { title: 'DEVICE', value: (device) => device.devicePath },
  { title: 'TYPE', value: (device) => device.type },
  { title: 'SIZE', value: (device) => formatBytes(device.sizeBytes), align: 'right' },
  { title: 'MODEL', value: (device) => device.model ?? '-' },
  { title: 'VOLUME', value: (device) => device.volumeId ?? '-' },
  { title: 'IN USE', value: (device) => device.inUseBy.join(', ') || '-' },
  { title: 'IDENTITIES', value: (device) => device.identities.join(', ') || '-' },
];

export function formatVolume(volume: Volume): string {
  const { mapping, problem } = volume;
  const fields = formatFields([
    ['id', volume.id],
    ['name', volume.name],
    ['identity', volume.identity],
    ['size', formatBytes(volume.sizeBytes)],
    ['added', formatTime(volume.createdAt)],
    ['state', mapping === null ? 'detached' : 'attached'],
    ['device', volume.devicePath ?? 'not here'],
    ...(mapping === null
      ? []
      : ([
          ['attached at', `${mapping.devicePath} (${mapping.deviceNumber})`],
          ['attached', formatTime(mapping.attachedAt)],
          ['checked', formatTime(mapping.verifiedAt)],
        ] as const)),
  ]);
  if (problem === null) return fields;
  return `${fields}\n${problem.code}: ${safeText(problem.message)}\n${safeText(problem.remedy)}\n`;
}

export function formatOperation({ error, result, ...operation }: Operation): string {
  const { share } = operation;
  const fields = formatFields([
    ['operation', operation.id],
    ['kind', operation.kind],
    ['state', operation.state],
    [operation.kind === 'materialize' ? 'export' : 'volume', operation.subjectId],
    ...(share === null || operation.state !== 'running'
      ? []
      : [['done', `${Math.floor(share * 100)} %`] as const]),
    ['created', formatTime(operation.createdAt)],
    ['ended', formatTime(operation.endedAt)],
  ]);
  const outcome =
    result?.kind === 'materialize' || result?.kind === 'attach-volume' || result?.kind === 'detach-volume'
      ? `\n${formatOperationResult(result)}`
      : '';
  const trouble =
    error === null ? '' : `\n${error.code}: ${safeText(error.message)}\n${safeText(error.remedy)}\n`;
  return fields + outcome + trouble;
}
