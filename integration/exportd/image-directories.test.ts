import { mkdir, symlink, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { ExportDefinition } from '../../src/exports/index.js';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { definition, fileOf, makeImage, namesAt, reads, startExportd, type ExportdRig } from './rig.js';

const TOOL = { timeoutMs: 20_000 };
const MIB = 1024 * 1024;

let directory: LabDirectory;
let rig: ExportdRig;

beforeAll(async () => {
  directory = await makeLabDirectory();
  for (const name of ['images', 'images-not', 'elsewhere']) await mkdir(directory.file(name));
  for (const secret of ['images-not/secret', 'elsewhere/secret']) {
    await writeFile(directory.file(secret), Buffer.alloc(MIB, 0x5e));
  }
  await makeImage(directory.file('images/base.qcow2'), { pattern: 0x11 });
  await symlink(directory.file('images'), directory.file('link'));
  await symlink(directory.file('elsewhere/secret'), directory.file('images/link'));
  const imageDirectories = [directory.file('link'), directory.file('not-mounted')];
  rig = await startExportd({ directory: directory.path, settings: { imageDirectories } });
});
afterAll(async () => {
  await rig.stop();
  const left = await findLeftovers(directory.path);
  await directory[Symbol.asyncDispose]();
  expect(left).toEqual([]);
});

async function serve(image: ExportDefinition) {
  await rig.write('disk.conf', image);
  const file = fileOf(await rig.reload(), 'disk.conf');
  expect(await namesAt(rig.unix(''))).toEqual(file.state === 'served' ? ['disk'] : []);
  return file;
}

test('images whose chains lie in a listed directory are served, by any name of it', async () => {
  await makeImage(directory.file('images/top.qcow2'), { pattern: 0x22, atMib: 1, backing: 'base.qcow2' });
  for (const name of ['images/top.qcow2', 'link/top.qcow2']) {
    expect(await serve(definition('disk', directory.file(name)))).toMatchObject({ state: 'served' });
    expect(await reads(rig.tcp('disk'), 0x11, 0)).toBe(true);
    expect(await reads(rig.tcp('disk'), 0x22, 1)).toBe(true);
  }
});

test.each(['elsewhere/secret', 'images-not/secret', 'images/link', 'images/../elsewhere/secret'])(
  'a file outside is refused: %s',
  async (name) => {
    const { error } = await serve(definition('disk', directory.file(name), { format: 'raw' }));
    expect(error).toEqual({
      code: 'EXPORT_REFUSED',
      message: `${directory.file(name)} lies in none of imageDirectories`,
    });
  },
);

test.each([
  ['the password file', '/etc/shadow'],
  ['a path that leads out', '../elsewhere/secret'],
  ['a link that leads out', 'link'],
])('a header that names %s is refused', async (_what, backing) => {
  const image = directory.file('images/hostile.qcow2');
  await runTool('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1M'], TOOL);
  await runTool('qemu-img', ['rebase', '-q', '-u', '-f', 'qcow2', '-F', 'raw', '-b', backing, image], TOOL);
  const { error } = await serve(definition('disk', image));
  expect(error?.code).toBe('EXPORT_REFUSED');
});

test('a device is refused unless it is listed', async () => {
  const { stdout } = await runTool('losetup', ['--find', '--show', directory.file('elsewhere/secret')], TOOL);
  const device = stdout.trim();
  try {
    const disk = definition('disk', device, { format: 'raw' });
    expect((await serve(disk)).error?.code).toBe('EXPORT_REFUSED');
    await rig.stop();
    rig = await startExportd({ directory: directory.path, settings: { imageDirectories: [device] } });
    expect((await serve(disk)).error).toBeNull();
    expect(await reads(rig.unix('disk'), 0x5e)).toBe(true);
  } finally {
    await rig.remove('disk.conf');
    await rig.reload();
    await runTool('losetup', ['--detach', device], TOOL);
  }
});
