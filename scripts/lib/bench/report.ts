import { formatBytes } from '../../../src/lib/units.js';
import type { GuestWrites } from './live-domain.js';
import { median, type Usage } from './usage.js';

export type Case = 'full' | 'incremental' | 'restore' | 'libvirt-full' | 'libvirt-incremental';
export type Tool = 'holdfast' | 'nbdcopy' | 'qemu-img-convert' | 'virtnbdbackup';

/** One run of one tool. */
export interface Result extends Usage {
  case: Case;
  tool: Tool;
  /** Of a live machine: what its guest saw meanwhile. */
  guestWriteMs?: GuestWrites;
}

interface Median extends Result {
  runs: number;
}

export function mediansOf(results: readonly Result[]): Median[] {
  const isSame = (a: Result, b: Result): boolean => a.case === b.case && a.tool === b.tool;
  const firsts = results.filter(
    (result, index) => results.findIndex((other) => isSame(result, other)) === index,
  );
  return firsts.map((first) => {
    const group = results.filter((result) => isSame(result, first));
    const of = (pick: (result: Result) => number): number => median(group.map(pick));
    const writes = group.flatMap(({ guestWriteMs }) => (guestWriteMs === undefined ? [] : [guestWriteMs]));
    const ofWrites = (key: keyof GuestWrites): number => median(writes.map((write) => write[key]));
    return {
      case: first.case,
      tool: first.tool,
      runs: group.length,
      wallSeconds: of((result) => result.wallSeconds),
      cpuSeconds: of((result) => result.cpuSeconds),
      peakRssBytes: of((result) => result.peakRssBytes),
      ...(writes.length === 0 ? {} : { guestWriteMs: { p50: ofWrites('p50'), p95: ofWrites('p95') } }),
    };
  });
}

/** A Markdown table; the ratio is Holdfast's wall time by the tool's. */
export function formatTable(results: readonly Result[], idleRssBytes: number): string {
  const medians = mediansOf(results);
  const rows = medians.map((row) => {
    const isHoldfast = row.tool === 'holdfast';
    return [
      row.case,
      row.tool,
      row.wallSeconds.toFixed(2),
      row.cpuSeconds.toFixed(2),
      formatBytes(row.peakRssBytes),
      isHoldfast ? formatBytes(Math.max(0, row.peakRssBytes - idleRssBytes)) : '',
      ratio(medians, row, ({ wallSeconds }) => wallSeconds),
    ];
  });
  const head = ['case', 'tool', 'wall s', 'CPU s', 'peak memory', 'over idle', 'Holdfast / tool'];
  return formatRows(head, rows);
}

/** The guest's own writes during the backups of live machines; empty without such. */
export function formatGuestTable(results: readonly Result[]): string {
  const medians = mediansOf(results.filter(({ guestWriteMs }) => guestWriteMs !== undefined));
  if (medians.length === 0) return '';
  const p50 = ({ guestWriteMs }: Median): number => guestWriteMs?.p50 ?? NaN;
  const p95 = ({ guestWriteMs }: Median): number => guestWriteMs?.p95 ?? NaN;
  const rows = medians.map((row) => [
    row.case,
    row.tool,
    ...[p50, p95].flatMap((pick) => [pick(row).toFixed(2), ratio(medians, row, pick)]),
  ]);
  const head = ['case', 'tool', 'guest write p50 ms', 'Holdfast / tool', 'p95 ms', 'Holdfast / tool'];
  return formatRows(head, rows);
}

function ratio(medians: readonly Median[], row: Median, pick: (row: Median) => number): string {
  const holdfast = medians.find((other) => other.case === row.case && other.tool === 'holdfast');
  if (row.tool === 'holdfast' || holdfast === undefined) return '';
  return (pick(holdfast) / pick(row)).toFixed(2);
}

function formatRows(head: readonly string[], rows: readonly (readonly string[])[]): string {
  return [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}
