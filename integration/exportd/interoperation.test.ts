import { writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { formatExportFile } from '../../src/exports/index.js';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { listWithNbdClient, startDebianNbdServer } from '../lab/nbd-server-debian.js';
import { startNbdkit } from '../lab/nbd-server.js';
import { definition, makeImage, reads, sizeAt, startExportd, type ExportdRig } from './rig.js';

const MIB = 1024 * 1024;
const TOOL = { timeoutMs: 60_000 };

let directory: LabDirectory;
let rig: ExportdRig;

beforeAll(async () => {
  directory = await makeLabDirectory();
  await makeImage(directory.file('base.qcow2'), { pattern: 0x11 });
  await makeImage(directory.file('top.qcow2'), { pattern: 0x22, atMib: 1, backing: 'base.qcow2' });
  await writeFile(directory.file('disk.raw'), Buffer.alloc(4 * MIB, 0x44));
  rig = await startExportd({ directory: directory.path });
  await rig.write('chain.conf', definition('chain', directory.file('top.qcow2'), { description: 'a chain' }));
  await rig.write('raw.conf', definition('raw', directory.file('disk.raw'), { format: 'raw' }));
  await rig.reload();
});
afterAll(async () => {
  await rig.stop();
  const left = await findLeftovers(directory.path);
  await directory[Symbol.asyncDispose]();
  expect(left).toEqual([]);
});

describe('clients that others made', () => {
  test('nbdinfo sees size, description, mode and allocation', async () => {
    const { stdout } = await runTool('nbdinfo', ['--json', rig.tcp('chain')], TOOL);
    const { exports } = JSON.parse(stdout) as { exports: Record<string, unknown>[] };
    expect(exports[0]).toMatchObject({
      'export-name': 'chain',
      'export-size': 16 * MIB,
      description: 'a chain',
      is_read_only: true,
      can_multi_conn: true,
      contexts: ['base:allocation'],
    });
    const list = await runTool('nbdinfo', ['--list', rig.unix('')], TOOL);
    expect(list.stdout).toMatch(/export="chain":[^]*export="raw":/);
  });

  test('nbdcopy and qemu-img read the same bytes as the image has', async () => {
    await runTool('nbdcopy', [rig.tcp('chain'), directory.file('copy.raw')], TOOL);
    const compare = (one: string, format: string, other: string) =>
      runTool('qemu-img', ['compare', '-q', '-f', format, '-F', 'raw', one, other], TOOL);
    await compare(directory.file('top.qcow2'), 'qcow2', directory.file('copy.raw'));
    await runTool(
      'qemu-img',
      ['convert', '-f', 'raw', '-O', 'raw', rig.unix('chain'), directory.file('convert.raw')],
      TOOL,
    );
    await compare(directory.file('top.qcow2'), 'qcow2', directory.file('convert.raw'));
  });

  test("nbdkit's nbd plugin passes it on", async () => {
    await using kit = await startNbdkit({
      socketPath: directory.file('kit.sock'),
      plugin: ['nbd', `uri=${rig.tcp('chain')}`],
      isReadOnly: true,
    });
    expect(await reads(kit.uri, 0x22, 1)).toBe(true);
  });

  test('nbd-client -l lists the names', async () => {
    expect(await listWithNbdClient(rig.port)).toEqual(['chain', 'raw']);
  });
});

describe("Debian's nbd-server on the same directory", () => {
  test('serves raw disks; of a container it serves nothing, and of an identity nothing', async () => {
    const identity = { kind: 'psk' as const, user: 'agent' };
    const own = definition('own', directory.file('disk.raw'), {
      ...{ format: 'raw', own: { identity, at: { port: 10_888 } } },
    });
    await writeFile(`${rig.exportsDirectory}/own.conf`, formatExportFile(own));
    await using server = await startDebianNbdServer({
      directory: directory.path,
      exportsDirectory: rig.exportsDirectory,
    });
    expect(await sizeAt(server.uri('raw'))).toBe(4 * MIB);
    expect(await reads(server.uri('raw'), 0x44, 2)).toBe(true);
    await expect(sizeAt(server.uri('chain'))).rejects.toThrow();
    await expect(sizeAt(server.uri('own'))).rejects.toThrow();
    await rig.remove('own.conf');
    await rig.reload();
  });
});
