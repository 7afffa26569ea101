import { expect, test } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { runTool } from '../../src/lib/process.js';
import { makeLabDirectory } from '../lab/directory.js';
import { GuestConsole, makeGuestDisk, readVerdict, type GuestMode } from '../lab/guest.js';
import { findLeftovers } from '../lab/leftovers.js';
import { startQemuGuest } from '../lab/qemu-guest.js';
import { startSlowFile } from '../lab/slow-file.js';
import { definition, fileOf, startExportd } from './rig.js';

const MIB = 1024 * 1024;
const TOOL = { timeoutMs: 20_000 };
const WAIT = { timeout: 60_000, interval: 50 };

/** Disks of a machine, over NBD: the first by the port, the second by the socket. */
function nbdDisks(port: number, socketPath: string): string[] {
  const servers = [
    { type: 'inet', host: '127.0.0.1', port: String(port) },
    { type: 'unix', path: socketPath },
  ];
  return servers.flatMap((server, index) => {
    const node = {
      driver: 'nbd',
      'node-name': `d${index}`,
      export: `disk${index}`,
      server,
      discard: 'unmap',
    };
    return ['-blockdev', JSON.stringify(node), '-device', `virtio-blk-pci,drive=d${index}`];
  });
}

test('a machine lives on exports, one of which is made to stand alone under it; nothing it wrote is missing', async () => {
  await using directory = await makeLabDirectory();
  await using cleanup = new CleanupStack();
  for (const name of ['a', 'b']) {
    await makeGuestDisk({ path: directory.file(`${name}.qcow2`), sizeBytes: 64 * MIB });
  }
  const slow = { content: directory.file('a.qcow2'), file: directory.file('slow.qcow2') };
  cleanup.use(await startSlowFile({ ...slow, bytesPerSecond: 2 * MIB }));
  const rig = cleanup.use(await startExportd({ directory: directory.path }));
  for (const [index, base] of ['slow.qcow2', 'b.qcow2'].entries()) {
    const image = directory.file(`overlay${index}.qcow2`);
    await runTool('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', image], TOOL);
    await rig.write(`disk${index}.conf`, definition(`disk${index}`, image, { isReadOnly: false }));
  }
  expect((await rig.reload()).files.map(({ error }) => error)).toEqual([null, null]);
  const boot = async (mode: GuestMode) => {
    const extra = nbdDisks(rig.port, rig.socketPath);
    const qemu = cleanup.use(await startQemuGuest(directory, { disks: [], name: mode, mode, extra }));
    return { qemu, console: new GuestConsole(qemu.serialFile) };
  };

  const writer = await boot('writer');
  await writer.console.waitFor(/^hf: record 25/m);
  const image = directory.file('overlay0.qcow2');
  await rig.write('disk0.conf', definition('disk0', image, { isReadOnly: false, materialize: true }));
  expect(fileOf(await rig.reload(), 'disk0.conf').materialize?.state).toBe('running');
  const progress = async () => fileOf(await rig.status(), 'disk0.conf').materialize?.state;
  await expect.poll(progress, WAIT).toBe('completed');
  const before = await writer.console.lastRecord();
  await expect.poll(() => writer.console.lastRecord(), WAIT).toBeGreaterThan(before + 50);
  const told = await writer.console.lastRecord();
  await writer.qemu.stop();

  const { vda, vdb } = await readVerdict((await boot('verify')).console);
  for (const verdict of [vda, vdb]) {
    expect(verdict).toMatchObject({ fsckReplayed: 0, missingRecords: 0 });
    expect(verdict.lastRecord).toBeGreaterThanOrEqual(told);
  }
  const { stdout } = await runTool('qemu-img', ['info', '-U', '-f', 'qcow2', '--output=json', image], TOOL);
  expect(stdout).not.toMatch(/backing/);
  await cleanup.run();
  expect(await findLeftovers(directory.path)).toEqual([]);
}, 240_000);
