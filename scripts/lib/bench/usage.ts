import { readFileSync, readdirSync } from 'node:fs';
import { errnoOf } from '../../../src/lib/errors.js';

const PAGE_BYTES = 4096;
const TICKS_PER_SECOND = 100;
const SAMPLE_INTERVAL_MS = 20;

/** What one run of a tool took. */
export interface Usage {
  wallSeconds: number;
  /** User and system time of all processes of the tool, those that ended included. */
  cpuSeconds: number;
  /** Largest sum of the resident memory of all its processes at one time, looked at every 20 ms. */
  peakRssBytes: number;
}

/** user, system, and the same of children that ended and were waited for: fields 14–17 of proc_pid_stat(5). */
interface Times {
  own: number;
  children: number;
}

function readTimes(pid: number): Times {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const fields = text
      .slice(text.lastIndexOf(')') + 2)
      .split(' ')
      .map(Number);
    const at = (field: number): number => fields[field - 3] ?? 0;
    return { own: at(14) + at(15), children: at(16) + at(17) };
  } catch (error) {
    if (isGone(error)) return { own: 0, children: 0 };
    throw error;
  }
}

function isGone(error: unknown): boolean {
  return errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ESRCH';
}

/** A process and everything it started that lives. */
export function listTree(root: number): number[] {
  const tree = [root];
  try {
    for (const task of readdirSync(`/proc/${root}/task`)) {
      const children = readFileSync(`/proc/${root}/task/${task}/children`, 'utf8');
      for (const pid of children.split(' ').filter((text) => text !== ''))
        tree.push(...listTree(Number(pid)));
    }
  } catch (error) {
    if (!isGone(error)) throw error;
  }
  return tree;
}

function readRss(pid: number): number {
  try {
    return Number(readFileSync(`/proc/${pid}/statm`, 'utf8').split(' ')[1]) * PAGE_BYTES;
  } catch (error) {
    if (isGone(error)) return 0;
    throw error;
  }
}

export function rssOfTree(pids: readonly number[]): number {
  return pids.reduce((sum, pid) => sum + readRss(pid), 0);
}

/** Whose processes are measured. */
export interface Subject {
  pids(): number[];
  /** Seconds of CPU so far; only differences mean something. */
  cpuSeconds(): number;
}

/** A daemon with all it starts: what its children used is counted when they have ended, or while they live. */
export function daemonSubject(pid: number): Subject {
  return {
    pids: () => listTree(pid),
    cpuSeconds: () =>
      listTree(pid)
        .map(readTimes)
        .reduce((sum, times) => sum + times.own + times.children, 0) / TICKS_PER_SECOND,
  };
}

/** The tools that this process starts from now on and waits for. What runs already (source, daemon) is not counted. */
export function childrenSubject(): Subject {
  const running = new Set(listTree(process.pid));
  return {
    pids: () => listTree(process.pid).filter((pid) => !running.has(pid)),
    cpuSeconds: () => readTimes(process.pid).children / TICKS_PER_SECOND,
  };
}

/** Runs the work and measures the subject meanwhile. */
export async function measure<T>(
  subject: Subject,
  work: () => Promise<T>,
): Promise<{ usage: Usage; result: T }> {
  let peakRssBytes = rssOfTree(subject.pids());
  const timer = setInterval(() => {
    peakRssBytes = Math.max(peakRssBytes, rssOfTree(subject.pids()));
  }, SAMPLE_INTERVAL_MS);
  const cpuBefore = subject.cpuSeconds();
  const startMs = performance.now();
  try {
    const result = await work();
    const wallSeconds = (performance.now() - startMs) / 1000;
    return { usage: { wallSeconds, cpuSeconds: subject.cpuSeconds() - cpuBefore, peakRssBytes }, result };
  } finally {
    clearInterval(timer);
  }
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  const upper = sorted[middle] ?? NaN;
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? NaN)) / 2;
}

/** The value that `share` of all values do not exceed. */
export function percentile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(sorted.length * share) - 1)] ?? NaN;
}
