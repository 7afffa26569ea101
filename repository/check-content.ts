import { EXPECT_HASH, EXPECT_ZERO, openCopySession, type CopySession } from '../src/nbd/index.js';
import { throwIfAborted } from '../src/lib/deadline.js';
import { MARK_HASH } from './agreement.js';
import { composeLayer, emptyWindow } from './composed-sums.js';
import type { CheckFinding, LayerTask } from './check-report.js';
import { describeTask, toFinding } from './check-layer.js';
import type { RepositoryContext } from './context.js';
import { PlanRows } from './plan-rows.js';
import { CLUSTER_DATA, Qcow2File } from './qcow2.js';
import { hashBytesOf } from './sums-format.js';
import { SumsReader } from './sums-reader.js';
import type { ChainLayer } from './types.js';

/** 256 MiB of disk in one window; two windows are outstanding so that the reader never waits for the planner. */
const WINDOW_CLUSTERS = 4096;
const STALL_TIMEOUT_MS = 300_000;
const MAX_FINDINGS = 16;

export interface ContentCheck {
  bytesVerified: number;
  findings: CheckFinding[];
}

interface ContentWork {
  layer: ChainLayer;
  signal: AbortSignal | undefined;
  /** Bytes of this layer read so far. */
  onBytes: (bytes: number) => void;
}

/** Reads a layer's own clusters and compares each with its hash. Structure must have been found sound. */
export async function verifyLayerContent(
  context: RepositoryContext,
  task: LayerTask,
  work: ContentWork,
): Promise<ContentCheck> {
  const result: ContentCheck = { bytesVerified: 0, findings: [] };
  try {
    await using image = await Qcow2File.open(work.layer.path);
    await using sums = await SumsReader.open(work.layer.sumsPath);
    await using session = await openCopySession(
      {
        source: { kind: 'files', paths: [work.layer.path] },
        sink: { kind: 'null' },
        diskBytes: task.disk.sizeBytes,
        hash: context.marker.hash,
        clusterBytes: context.marker.clusterBytes,
        connectTimeoutMs: STALL_TIMEOUT_MS,
        stallTimeoutMs: STALL_TIMEOUT_MS,
      },
      { signal: work.signal },
    );
    await runWindows({ context, task, work, image, sums, session, result });
  } catch (error) {
    throwIfAborted(work.signal);
    result.findings.push(toFinding(task, error));
  }
  return result;
}

interface ContentRun {
  context: RepositoryContext;
  task: LayerTask;
  work: ContentWork;
  image: Qcow2File;
  sums: SumsReader;
  session: CopySession;
  result: ContentCheck;
}

async function runWindows(run: ContentRun): Promise<void> {
  const total = run.image.clusterCount;
  let outstanding: Promise<void> = Promise.resolve();
  for (let at = 0; at < total;) {
    throwIfAborted(run.work.signal);
    at = await run.sums.nextCluster(at);
    if (at >= total) break;
    const count = Math.min(WINDOW_CLUSTERS, total - at);
    // Planned here, one at a time: the readers of sums and image have one place each.
    const submitted = submitWindow(run, await planWindow(run, at, count));
    // Settled below in order; a failure meanwhile must not count as unhandled.
    submitted.catch(() => undefined);
    await outstanding;
    outstanding = submitted;
    at += count;
  }
  await outstanding;
}

async function submitWindow(run: ContentRun, plan: { rows: Float64Array; expect: Buffer }): Promise<void> {
  const answer = await run.session.submit({
    ...plan,
    zeroPolicy: 'skip',
    emitEntries: false,
    expectPolicy: 'verify',
    collectMismatches: true,
  });
  run.result.bytesVerified += answer.bytesRead;
  run.work.onBytes(run.result.bytesVerified);
  addMismatches(run, answer.mismatches);
}

async function planWindow(
  run: ContentRun,
  start: number,
  count: number,
): Promise<{ rows: Float64Array; expect: Buffer }> {
  const { hash, clusterBytes } = run.context.marker;
  const hashBytes = hashBytesOf(hash);
  const composed = emptyWindow(start, count, hashBytes);
  const marks = await composeLayer(composed, run.sums, 0);
  const { kinds, hostOffsets } = await run.image.window(start, count);
  const diskBytes = run.task.disk.sizeBytes;
  const rows = new PlanRows({ clusterBytes, diskBytes, hashBytes, maxClusters: count });
  for (let i = 0; i < count; i += 1) {
    if (kinds[i] !== CLUSTER_DATA) continue;
    const kind = marks[i] === MARK_HASH ? EXPECT_HASH : EXPECT_ZERO;
    const place = { cluster: start + i, fileIndex: 0, fileOffset: hostOffsets[i] ?? 0, kind };
    rows.addCluster(place, composed.hashes, i * hashBytes);
  }
  return { rows: rows.rows(), expect: rows.expect() };
}

function addMismatches(run: ContentRun, mismatches: Float64Array): void {
  const { findings } = run.result;
  for (const offset of mismatches) {
    if (findings.length >= MAX_FINDINGS) return;
    findings.push({
      ...describeTask(run.task),
      code: 'LAYER_CORRUPT',
      severity: 'error',
      message: `the bytes of a cluster do not have the hash taken at backup (disk offset ${offset})`,
      offset,
      file: run.work.layer.path,
    });
  }
}
