import { mkdir, rm, symlink, truncate, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { PointManifest } from '../../repository/types.js';
import { MIB } from '../../src/lib/units.js';
import { RepositoryLab } from './repository-lab.js';

let lab: RepositoryLab;
let point: PointManifest;
let directory: string;

beforeEach(async () => {
  lab = await RepositoryLab.create();
  point = await lab.commit(new Map([[0, 1]]), {
    configFiles: [
      { name: 'nvram', content: Buffer.from([0, 255, 10]) },
      { name: 'domain.xml', content: Buffer.from('<domain/>') },
    ],
  });
  directory = path.join(lab.repository.root, 'vms', point.vmId, 'config', point.pointId);
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const read = (): Promise<{ name: string; content: Buffer }[]> =>
  lab.repository.readConfigFiles(point.vmId, point.pointId);

describe('readConfigFiles', () => {
  it('answers what was committed, byte for byte, and nothing for a point without', async () => {
    expect(await read()).toEqual([
      { name: 'domain.xml', content: Buffer.from('<domain/>') },
      { name: 'nvram', content: Buffer.from([0, 255, 10]) },
    ]);
    const bare = await lab.commit(new Map([[1, 1]]));
    expect(await lab.repository.readConfigFiles(bare.vmId, bare.pointId)).toEqual([]);
  });

  it('passes over what a crash left of a file being written', async () => {
    await writeFile(path.join(directory, '.tmp-1'), 'half');
    expect((await read()).map(({ name }) => name)).toEqual(['domain.xml', 'nvram']);
  });

  it('refuses links, directories, hidden files, too many and too much', async () => {
    const spoil: [string, (file: string) => Promise<unknown>][] = [
      ['link', (file) => symlink('/etc/passwd', file)],
      ['sub', (file) => mkdir(file)],
      ['.hidden', (file) => writeFile(file, '')],
      ['large', async (file) => (await writeFile(file, ''), truncate(file, 65 * MIB))],
    ];
    for (const [name, make] of spoil) {
      const file = path.join(directory, name);
      await make(file);
      await expect(read(), name).rejects.toMatchObject({
        code: expect.stringMatching(/^REPOSITORY_(FORMAT|IO)$/) as string,
      });
      await rm(file, { recursive: true });
    }
    for (let count = 0; count < 256; count += 1) await writeFile(path.join(directory, `f${count}`), '');
    await expect(read()).rejects.toMatchObject({ code: 'REPOSITORY_FORMAT' });
  });
});
