import { mkdir, readFile, readdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runTool, type ToolResult } from '../../src/lib/process.js';
import { RepositoryLab, expectedDisk, type Fills } from '../../test/repository/repository-lab.js';
import type { PointManifest } from '../../repository/types.js';

const SIZE = 10 * 65536 + 777;
const FULL: Fills = new Map([
  [0, 1],
  [5, 2],
  [10, 9],
]);
const CHANGES: Fills = new Map<number, number | 'zero'>([
  [0, 'zero'],
  [6, 3],
]);

let lab: RepositoryLab;
let first: PointManifest;
let second: PointManifest;
beforeEach(async () => {
  lab = await RepositoryLab.create({ sizeBytes: SIZE });
  first = await lab.commit(FULL);
  second = await lab.commit(CHANGES);
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

function rescue(args: string[]): Promise<ToolResult> {
  const script = path.resolve(import.meta.dirname, '../../repository/rescue-main.ts');
  return runTool(process.execPath, ['--import', 'tsx', script, ...args], {
    timeoutMs: 25_000,
    acceptExitCodes: [0, 1, 2, 3],
  });
}

const disk = (...fills: Fills[]): Buffer =>
  expectedDisk(fills.map((one) => ({ fills: one, sizeBytes: SIZE })));

describe('holdfast-rescue', () => {
  it('lists machines and points', async () => {
    const { stdout, exitCode } = await rescue(['list', lab.root]);
    expect(exitCode).toBe(0);
    expect(stdout).toContain(`lab  ${lab.vmId}`);
    expect(stdout.indexOf(first.pointId)).toBeLessThan(stdout.indexOf(second.pointId));
    const json = JSON.parse((await rescue(['list', lab.root, '--json'])).stdout) as {
      points: { pointId: string }[];
    }[];
    expect(json[0]?.points.map(({ pointId }) => pointId)).toEqual([first.pointId, second.pointId]);
  });

  it('restores every point to raw and QCOW2, byte for byte, and leaves nothing else', async () => {
    const out = path.join(lab.directory, 'out');
    await mkdir(out);
    for (const [point, expected] of [
      [first, disk(FULL)],
      [second, disk(FULL, CHANGES)],
    ] as const) {
      const raw = path.join(out, `${point.pointId}.raw`);
      const qcow2 = path.join(out, `${point.pointId}.qcow2`);
      expect((await rescue(['restore', lab.root, '--point', point.pointId, '--output', raw])).exitCode).toBe(
        0,
      );
      expect((await readFile(raw)).equals(expected)).toBe(true);
      const args = [
        'restore',
        lab.root,
        '--point',
        point.pointId,
        '--disk',
        '0',
        '--output',
        qcow2,
        '--format',
        'qcow2',
      ];
      expect((await rescue(args)).exitCode).toBe(0);
      await runTool('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', raw, qcow2], { timeoutMs: 10_000 });
    }
    expect(await readdir(out)).toHaveLength(4);
  });

  it('needs nothing but the directory: another owner, locks and trash gone, read-only layers', async () => {
    await rm(path.join(lab.root, 'locks'), { recursive: true });
    await rm(path.join(lab.root, 'trash'), { recursive: true });
    const file = path.join(lab.directory, 'out.raw');
    const before = (await readdir(lab.root, { recursive: true })).sort();
    expect((await rescue(['restore', lab.root, '--point', second.pointId, '--output', file])).exitCode).toBe(
      0,
    );
    expect((await rescue(['check', lab.root])).exitCode).toBe(0);
    expect((await readdir(lab.root, { recursive: true })).sort()).toEqual(before);
  });

  it('reports damage with exit code 3 and restores past it only when told', async () => {
    const layer = path.join(lab.diskDirectory(), `${first.disks[0]?.layerId ?? ''}.qcow2`);
    const data = await readFile(layer);
    data[data.lastIndexOf(Buffer.alloc(4096, 2)) + 5] = 0xff;
    await rm(layer);
    await writeFile(layer, data);
    const file = path.join(lab.directory, 'out.raw');
    const args = ['restore', lab.root, '--point', second.pointId, '--output', file];
    const refused = await rescue(args);
    expect(refused.exitCode).toBe(3);
    expect(refused.stderr).toContain('LAYER_CORRUPT');
    expect(refused.stderr).toContain(String(5 * 65536));
    expect((await readdir(lab.directory)).sort()).toEqual(['repository']);
    const accepted = await rescue([...args, '--accept-damage']);
    expect(accepted.exitCode).toBe(3);
    expect(accepted.stdout).toContain(`offset ${5 * 65536}`);
    const restored = await readFile(file);
    expect(restored.subarray(6 * 65536).equals(disk(FULL, CHANGES).subarray(6 * 65536))).toBe(true);
    const check = await rescue(['check', lab.root]);
    expect(check.exitCode).toBe(3);
    expect(check.stdout).toContain('damaged points');
    expect((await rescue(['check', lab.root, '--structure-only'])).exitCode).toBe(0);
  });

  it('lists on past a manifest that cannot be read, and restores what does not need it', async () => {
    const alone = await lab.commit(FULL, { parent: null });
    await rm(lab.pointFile(first.pointId));
    await writeFile(lab.pointFile(first.pointId), 'rotten');
    const list = await rescue(['list', lab.root]);
    expect(list.exitCode).toBe(3);
    expect(list.stdout).toContain(alone.pointId);
    expect(list.stdout).toContain(`cannot be read: ${first.pointId}`);
    const file = path.join(lab.directory, 'out.raw');
    expect((await rescue(['restore', lab.root, '--point', alone.pointId, '--output', file])).exitCode).toBe(
      0,
    );
    const broken = await rescue(['restore', lab.root, '--point', second.pointId, '--output', `${file}2`]);
    expect(broken.exitCode).toBe(1);
    expect(broken.stderr).toContain('MANIFEST_UNREADABLE');
  });

  it.each([
    [['restore', 'ROOT', '--point', 'zz', '--output', '/dev/shm/never'], 2],
    [['restore', 'ROOT', '--point', '01ARZ3NDEKTSV4RRFFQ69G5FAV', '--output', '/dev/shm/never'], 1],
    [['restore', 'ROOT', '--output', '/dev/shm/never'], 2],
    [['list', '/nowhere/at/all'], 1],
    [['frobnicate'], 2],
    [[], 2],
    [['--help'], 0],
  ])('ends %j with exit code %i', async (args, exitCode) => {
    const answer = await rescue(args.map((arg) => (arg === 'ROOT' ? lab.root : arg)));
    expect(answer.exitCode).toBe(exitCode);
  });

  it('never writes into the repository nor over an existing file', async () => {
    const inside = path.join(lab.root, 'out.raw');
    const args = ['restore', lab.root, '--point', second.pointId, '--output'];
    expect((await rescue([...args, inside])).stderr).toContain('TARGET_FORBIDDEN');
    const file = path.join(lab.directory, 'there.raw');
    await writeFile(file, 'precious');
    expect((await rescue([...args, file])).stderr).toContain('TARGET_EXISTS');
    expect(await readFile(file, 'utf8')).toBe('precious');
    expect((await rescue([...args, file, '--overwrite'])).exitCode).toBe(0);
  });
});
