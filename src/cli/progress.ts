import { systemClock, type Clock } from '../lib/clock.js';
import { formatBytes, formatDuration } from '../lib/units.js';
import type { Schemas } from './client.js';
import type { TextStream } from './environment.js';
import { displayWidth, padEnd, safeText } from './text.js';

type Run = Schemas['Run'];
type DiskProgress = Schemas['RunDiskProgress'];

const BAR_CHARACTERS = 24;
/** Without a terminal: at most one line in this time. */
const LINE_INTERVAL_MS = 5000;
const MAX_NAME_CHARACTERS = 24;

/** Shows a run on standard error: a bar for each disk on a terminal, else a line every few seconds. */
export class ProgressDisplay {
  #shownLines = 0;
  #lastLineMs = -Infinity;
  #lastStage = '';

  constructor(
    private readonly out: TextStream,
    private readonly diskNames: ReadonlyMap<string, string>,
    private readonly clock: Clock = systemClock,
  ) {}

  update(run: Run): void {
    if (this.out.isTTY === true) this.#redraw(this.#lines(run));
    else this.#addLine(run);
  }

  /** Leaves what is shown in place; the next output begins on a line of its own. */
  finish(): void {
    this.#shownLines = 0;
  }

  #redraw(lines: string[]): void {
    // A terminal that does not know its width says 0.
    const known = this.out.columns ?? 0;
    const columns = Math.max(20, known === 0 ? 80 : known);
    const up = this.#shownLines === 0 ? '' : `\u001b[${this.#shownLines}A`;
    const text = lines.map((line) => `\u001b[2K${cut(line, columns - 1)}\n`).join('');
    this.out.write(`${up}\r${text}\u001b[J`);
    this.#shownLines = lines.length;
  }

  #addLine(run: Run): void {
    const now = this.clock.monotonicMs();
    const stage = `${run.state} ${run.stage ?? ''}`;
    if (stage === this.#lastStage && now - this.#lastLineMs < LINE_INTERVAL_MS) return;
    this.#lastStage = stage;
    this.#lastLineMs = now;
    this.out.write(`${this.#lines(run).join('; ')}\n`);
  }

  #lines(run: Run): string[] {
    const { progress } = run;
    const rate = progress.bytesPerSecond > 0 ? `  ${formatBytes(progress.bytesPerSecond)}/s` : '';
    const eta = progress.etaSeconds === null ? '' : `  ETA ${formatDuration(progress.etaSeconds * 1000)}`;
    const share = progress.share === null ? '' : `  ${percent(progress.share)}`;
    const marks = [
      ...(run.attempt > 1 ? [`attempt ${run.attempt}`] : []),
      ...(run.isStalled ? ['stalled'] : []),
      ...(run.isCancelRequested && run.state === 'running' ? ['being cancelled'] : []),
    ];
    const mark = marks.length === 0 ? '' : `  (${marks.join(', ')})`;
    const head = `${run.kind} ${run.stage === null || run.state !== 'running' ? run.state : run.stage}`;
    return [`${head}${share}${rate}${eta}${mark}`, ...progress.disks.map((disk) => this.#diskLine(disk))];
  }

  #diskLine(disk: DiskProgress): string {
    const name = safeText(this.diskNames.get(disk.diskId) ?? disk.diskId);
    const done = Math.min(disk.totalBytes, disk.bytesRead + disk.bytesZeroed);
    const share = disk.totalBytes === 0 ? 0 : done / disk.totalBytes;
    const method = disk.method === null ? '' : `  ${disk.method}`;
    const width = Math.min(
      MAX_NAME_CHARACTERS,
      Math.max(...[...this.diskNames.values()].map((other) => displayWidth(safeText(other))), 4),
    );
    const amounts = `${formatBytes(done)} of ${formatBytes(disk.totalBytes)}`;
    return `  ${padEnd(cut(name, width), width)}  ${bar(share)}  ${percent(share)}  ${amounts}${method}`;
  }
}

function percent(share: number): string {
  return `${String(Math.floor(Math.min(1, Math.max(0, share)) * 100)).padStart(3)} %`;
}

function bar(share: number): string {
  const full = Math.round(Math.min(1, Math.max(0, share)) * BAR_CHARACTERS);
  return `[${'#'.repeat(full)}${'-'.repeat(BAR_CHARACTERS - full)}]`;
}

/** The text, cut to so many columns. */
function cut(text: string, columns: number): string {
  if (displayWidth(text) <= columns) return text;
  let kept = '';
  let width = 0;
  for (const character of text) {
    width += displayWidth(character);
    if (width > columns - 1) break;
    kept += character;
  }
  return `${kept}…`;
}
