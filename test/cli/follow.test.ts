import { spawn } from 'node:child_process';
import path from 'node:path';
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { FakeEngine } from '../api/fake-engine.js';
import { addRepository, addVm, nextRun, startCliFixture, type CliFixture } from './fixture.js';

let cli: CliFixture;
beforeAll(async () => {
  cli = await startCliFixture();
});
beforeEach(async () => {
  cli.api.engine.reset();
  await addRepository(cli);
});
afterAll(async () => {
  await cli[Symbol.asyncDispose]();
});

const BACKUP = ['backup', 'run', 'web-01', '--repository', 'main'];
const TIMES = { startedAt: '2026-11-21T09:00:01.000Z', endedAt: '2026-11-21T09:01:01.000Z' };

function progressOf(run: RunView, diskId: string, doneBytes: number): Partial<RunView> {
  return {
    state: 'running',
    stage: 'transfer',
    progress: {
      share: doneBytes / 1024 ** 3,
      bytesPerSecond: 200 * 1024 ** 2,
      etaSeconds: 4,
      disks: [
        {
          diskId: diskId as never,
          totalBytes: 1024 ** 3,
          bytesRead: doneBytes,
          bytesWritten: doneBytes,
          bytesZeroed: 0,
          bytesSkipped: 0,
          method: 'full',
          reason: { code: 'FIRST_POINT', sentence: 'There is no point to stand on.' },
        },
      ],
      push: null,
    },
  };
}

test('a backup is followed with a bar for each disk on a terminal', async () => {
  const vm = await addVm(cli);
  const running = cli.run(BACKUP, { columns: 100 });
  const run = await nextRun(cli);
  cli.api.engine.moveRun(run.id, progressOf(run, vm.disks[0]!.id, 512 * 1024 ** 2));
  cli.api.engine.moveRun(run.id, {
    state: 'completed',
    ...TIMES,
    result: { kind: 'backup', pointId: run.pointId! },
  });
  const result = await running;
  expect(result.code).toBe(0);
  expect(result.stderr).toContain('backup transfer   50 %  200 MiB/s  ETA 4.0 s');
  expect(result.stderr).toContain('vda   [############------------]   50 %  512 MiB of 1.0 GiB  full');
  expect(result.stdout).toContain(`Point ${run.pointId} is committed.`);
  expect(result.stdout).toMatch(/^took\s+1 min 00 s$/m);
  // eslint-disable-next-line no-control-regex -- no escape sequence may reach what a program reads
  expect(result.stdout).not.toMatch(/\u001b/);
});

test('without a terminal there are plain lines, few of them', async () => {
  const vm = await addVm(cli);
  const running = cli.run([...BACKUP, '--json']);
  const run = await nextRun(cli);
  for (let i = 1; i <= 50; i += 1) {
    cli.api.engine.moveRun(run.id, progressOf(run, vm.disks[0]!.id, i * 1024 ** 2));
  }
  cli.api.engine.moveRun(run.id, { state: 'completed', result: { kind: 'backup', pointId: run.pointId! } });
  const result = await running;
  expect(result.code).toBe(0);
  expect(result.json).toMatchObject({ id: run.id, state: 'completed' });
  // eslint-disable-next-line no-control-regex -- a log file must not get escape sequences
  expect(result.stderr).not.toMatch(/\u001b/);
  expect(result.stderr.trim().split('\n').length).toBeLessThanOrEqual(4);
});

test.each([
  ['failed', 1],
  ['cancelled', 5],
  ['interrupted', 5],
] as const)('a run that ends as %s gives exit code %d, code and remedy', async (state, code) => {
  await addVm(cli);
  const running = cli.run(BACKUP);
  const run = await nextRun(cli);
  const error = {
    code: 'SOURCE_UNREACHABLE' as const,
    message: 'no answer',
    remedy: 'Start it.',
    details: {},
  };
  cli.api.engine.moveRun(run.id, { state, error, ...TIMES });
  const result = await running;
  expect(result.code).toBe(code);
  expect(result.stdout).toContain('SOURCE_UNREACHABLE: no answer\nStart it.\n');
});

test('a check that finds damage fails, one with warnings only does not', async () => {
  for (const [severity, code] of [
    ['error', 1],
    ['warning', 0],
  ] as const) {
    const running = cli.run(['repository', 'check', 'main']);
    const run = await nextRun(cli);
    const finding = { code: 'LAYER_CORRUPT' as const, severity, message: 'cluster 5', file: '/a.qcow2' };
    const counts = { vms: 1, points: 2, layers: 2, bytesVerified: 1024 ** 2 };
    cli.api.engine.moveRun(run.id, {
      state: 'completed',
      result: { kind: 'check', report: { ...counts, findings: [finding], damagedPoints: [] } },
    });
    const result = await running;
    expect(result.code).toBe(code);
    expect(result.stdout).toContain('LAYER_CORRUPT');
    expect(result.stdout).toContain('1.0 MiB compared with hashes');
    await pollUntil(() => (cli.api.engine.watchers === 0 ? true : undefined), {
      timeoutMs: 5000,
      what: 'the end of watching',
    });
  }
});

test('run watch of an ended run prints it at once', async () => {
  await cli.run(['repository', 'rescan', 'main', '--detach']);
  const run = cli.api.engine.runs[0]!;
  cli.api.engine.moveRun(run.id, { state: 'completed', result: { kind: 'rescan', vms: 2, points: 7 } });
  const result = await cli.run(['run', 'watch', run.id]);
  expect(result.code).toBe(0);
  expect(result.stdout).toContain('Found 2 machines with 7 points.');
});

test('Ctrl-C leaves the run going and says how to cancel it', async () => {
  await addVm(cli);
  const interrupt = new AbortController();
  const running = cli.run(BACKUP, { signal: interrupt.signal });
  const run = await nextRun(cli);
  interrupt.abort();
  const result = await running;
  expect(result.code).toBe(130);
  expect(result.stderr).toContain(`holdfast run cancel ${run.id}`);
  expect(cli.api.engine.runs[0]!.isCancelRequested).toBe(false);
});

test('a stream that is cut is taken up again', async () => {
  await addVm(cli);
  const { engine } = cli.api;
  const watch = FakeEngine.prototype.watchRun.bind(engine);
  let streams = 0;
  engine.watchRun = async function* (id, signal) {
    streams += 1;
    for await (const view of watch(id, signal)) {
      yield view;
      if (streams === 1) throw new Error('cut');
    }
  };
  const running = cli.run(BACKUP);
  const run = await nextRun(cli);
  await pollUntil(() => (streams === 2 && engine.watchers === 1 ? true : undefined), {
    timeoutMs: 5000,
    what: 'the second stream',
  });
  engine.moveRun(run.id, { state: 'completed', result: { kind: 'backup', pointId: run.pointId! } });
  expect((await running).code).toBe(0);
  engine.watchRun = watch;
});

test('the real command ends with 130 on SIGINT, its token in neither argv nor output', async () => {
  await addVm(cli);
  const main = path.join(import.meta.dirname, '../../src/cli/main.ts');
  const args = ['--import', 'tsx', main, ...BACKUP];
  const child = spawn(process.execPath, args, {
    env: {
      PATH: process.env['PATH'],
      HOLDFAST_URL: cli.api.server.url,
      HOLDFAST_TOKEN_FILE: cli.tokenFile,
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => (output += chunk.toString()));
  }
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
  try {
    await nextRun(cli);
    child.kill('SIGINT');
    expect(await ended).toBe(130);
  } finally {
    child.kill('SIGKILL');
    await ended;
  }
  expect(output).toContain('The run goes on.');
  expect(output + child.spawnargs.join(' ')).not.toContain(cli.api.token);
});
