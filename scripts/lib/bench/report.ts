import { formatBytes } from '../../../src/lib/units.js';
import { median, type Usage } from './usage.js';

export type Case = 'full' | 'incremental' | 'restore';
export type Tool = 'holdfast' | 'nbdcopy' | 'qemu-img-convert';

/** One run of one tool. */
export interface Result extends Usage {
  case: Case;
  tool: Tool;
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
    return {
      case: first.case,
      tool: first.tool,
      runs: group.length,
      wallSeconds: of((result) => result.wallSeconds),
      cpuSeconds: of((result) => result.cpuSeconds),
      peakRssBytes: of((result) => result.peakRssBytes),
    };
  });
}

/** A Markdown table; the ratio is Holdfast's wall time by the tool's. */
export function formatTable(results: readonly Result[], idleRssBytes: number): string {
  const medians = mediansOf(results);
  const rows = medians.map((row) => {
    const holdfast = medians.find((other) => other.case === row.case && other.tool === 'holdfast');
    const isHoldfast = row.tool === 'holdfast';
    return [
      row.case,
      row.tool,
      row.wallSeconds.toFixed(2),
      row.cpuSeconds.toFixed(2),
      formatBytes(row.peakRssBytes),
      isHoldfast ? formatBytes(Math.max(0, row.peakRssBytes - idleRssBytes)) : '',
      isHoldfast || holdfast === undefined ? '' : (holdfast.wallSeconds / row.wallSeconds).toFixed(2),
    ];
  });
  const head = ['case', 'tool', 'wall s', 'CPU s', 'peak memory', 'over idle', 'Holdfast / tool'];
  return [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}
