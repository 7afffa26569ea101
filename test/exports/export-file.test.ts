import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  createExportFile,
  digestExportFile,
  formatExportFile,
  parseExportFile,
  readExportFile,
  removeExportFile,
  replaceExportFile,
  type ExportDefinition,
} from '../../src/exports/index.js';

const DEFINITION: ExportDefinition = {
  name: 'backup-web-disk0',
  imagePath: '/srv/backups/disk.qcow2',
  format: 'qcow2',
  isReadOnly: true,
  sizeBytes: 1024,
  description: 'the disk of web',
  materialize: false,
  own: null,
};

const RAW = '[a]\nexportname = /dev/sdb\nformat = raw\nreadonly = true\n';

describe('export files', () => {
  test('are sections that nbd-server can read, with a container kept from it', () => {
    expect(formatExportFile(DEFINITION)).toBe(
      [
        '[backup-web-disk0]',
        'exportname = /srv/backups/disk.qcow2',
        'readonly = true',
        'format = qcow2',
        'size = 1024',
        'description = the disk of web',
        'prerun = /bin/false',
        '',
      ].join('\n'),
    );
    const raw = formatExportFile({ ...DEFINITION, format: 'raw' });
    expect(raw).not.toMatch(/prerun/);
    const overlay = formatExportFile({ ...DEFINITION, isReadOnly: false, materialize: true });
    expect(overlay).toMatch(/^materialize = true$/m);
    const own = { identity: { kind: 'psk' as const, user: 'agent' }, at: { port: 10_811 } };
    expect(formatExportFile({ ...DEFINITION, format: 'raw', own })).toMatch(/prerun = \/bin\/false/);
  });

  test('say what was written into them, whatever it is', () => {
    const anyPath = fc
      .string({ unit: 'grapheme', maxLength: 60 })
      .map((text) => `/${text.replaceAll('\0', '')}`);
    const anyOwn = fc.record({
      identity: fc.oneof(
        fc.record({ kind: fc.constant('psk' as const), user: fc.stringMatching(/^[a-z][a-z0-9._-]{0,20}$/) }),
        fc.record({
          kind: fc.constant('x509' as const),
          distinguishedName: fc.stringMatching(/^[A-Z]+=[ -~]{1,40}$/),
        }),
      ),
      at: fc.oneof(fc.record({ port: fc.integer({ min: 1, max: 65_535 }) }), fc.record({ socket: anyPath })),
    });
    const anyAccess = fc.constantFrom(
      ...(['raw', 'qcow2'] as const).flatMap((format) =>
        [true, false].map((isReadOnly) => ({ format, isReadOnly, materialize: false })),
      ),
      { format: 'qcow2' as const, isReadOnly: false, materialize: true },
    );
    const anyFacts = fc.record({
      name: fc.stringMatching(/^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/),
      imagePath: anyPath,
      sizeBytes: fc.option(fc.integer({ min: 1, max: Number.MAX_SAFE_INTEGER })),
      description: fc.option(
        fc.string({ unit: 'grapheme', maxLength: 80 }).map((text) => text.replaceAll('\0', '')),
      ),
      own: fc.option(anyOwn),
    });
    fc.assert(
      fc.property(anyFacts, anyAccess, (facts, access) => {
        const definition: ExportDefinition = { ...facts, ...access };
        expect(parseExportFile(formatExportFile(definition))).toEqual(definition);
      }),
    );
  });

  test('written by hand for nbd-server are read, with the format added', () => {
    const text = '# a disk\n\n[disk-1]\n';
    expect(
      parseExportFile(
        `${text}  exportname=/dev/sdb\n\treadonly = 1  \nflush = true\nformat = raw\ndescription = a\\sb\n`,
      ),
    ).toMatchObject({ name: 'disk-1', imagePath: '/dev/sdb', isReadOnly: true, description: 'a b' });
  });

  test.each([
    ['nothing', '', /no section/],
    ['two exports', `${RAW}[b]\n`, /line 5: a second section/],
    ['a line before the section', `x = 1\n${RAW}`, /line 1/],
    ['a section that does not end', '[a\n', /line 1/],
    ['no key', '[a]\nhello\n', /line 2/],
    ['a key twice', `${RAW}format = qcow2\n`, /line 5: a second format/],
    ['an unknown escape', `${RAW}description = \\q\n`, /line 5: an unknown escape/],
    ['an escape cut off', `${RAW}description = \\`, /line 5: an unknown escape/],
    ['a name with a slash', RAW.replace('[a]', '[a/b]'), /name/],
    ['a name of 64 characters', RAW.replace('[a]', `[${'a'.repeat(64)}]`), /64 characters/],
    ['an unknown key', `${RAW}raedonly = true\n`, /raedonly/],
    ['a key that would mean something else', `${RAW}copyonwrite = true\n`, /copyonwrite/],
    ['no mode', RAW.replace(/readonly.*\n/, ''), /readonly must be stated/],
    ['another mode', RAW.replace('= true', '= yes'), /readonly must be true or false/],
    ['no format', RAW.replace(/format.*\n/, ''), /format must be stated/],
    ['another format', RAW.replace('raw', 'vmdk'), /format must be raw or qcow2/],
    ['a relative path', RAW.replace('/dev', 'dev'), /absolute/],
    ['a size that is none', `${RAW}size = 1G\n`, /size/],
    ['a size beyond all numbers', `${RAW}size = 9007199254740993\n`, /size/],
    ['an empty disk', `${RAW}size = 0\n`, /size/],
    ['a command to run', `${RAW}prerun = /bin/sh\n`, /prerun/],
    ['a long description', `${RAW}description = ${'x'.repeat(1001)}\n`, /description/],
    ['a read-only image to materialize', `${RAW}materialize = true\n`, /writable export of a qcow2/],
    [
      'a raw image to materialize',
      `${RAW.replace('true', 'false')}materialize = true\n`,
      /writable export of a qcow2/,
    ],
    ['a port without an identity', `${RAW}port = 10811\n`, /identity/],
    ['an identity without an address', `${RAW}identity = psk:a\n`, /port or a socket/],
    ['an identity with two addresses', `${RAW}identity = psk:a\nport = 1\nsocket = /x\n`, /port or a socket/],
    ['an identity of an unknown kind', `${RAW}identity = password:a\nport = 1\n`, /identity/],
    ['an identity that is a path', `${RAW}identity = psk:../a\nport = 1\n`, /identity/],
    ['a port that is none', `${RAW}identity = psk:a\nport = 70000\n`, /port/],
  ])('with %s are refused', (_what, text, message) => {
    expect(() => parseExportFile(text)).toThrow(message);
  });

  test('never make the parser fail in another way', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 200 }), (text) => {
        try {
          parseExportFile(`[a]\n${text}`);
        } catch (error) {
          expect(error).toMatchObject({ code: 'INVALID_INPUT' });
        }
      }),
    );
  });

  test('are created exclusively, and removed', async () => {
    const directory = await mkdtemp(path.join(os.tmpdir(), 'hf-exports-'));
    try {
      const written = await createExportFile(directory, DEFINITION);
      const content = await readFile(path.join(directory, written.file));
      expect(written).toEqual({ file: 'backup-web-disk0.conf', digest: digestExportFile(content) });
      const other = { ...DEFINITION, imagePath: '/other' };
      await expect(createExportFile(directory, other)).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(await readFile(path.join(directory, written.file))).toEqual(content);
      const rivals = await Promise.allSettled(
        Array.from({ length: 8 }, () => createExportFile(directory, { ...DEFINITION, name: 'rival' })),
      );
      expect(rivals.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
      await removeExportFile(directory, 'rival');
      await removeExportFile(directory, 'rival');
      expect(await readdir(directory)).toEqual(['backup-web-disk0.conf']);
    } finally {
      await rm(directory, { recursive: true });
    }
  });

  test.each([' ', '\t', '\u00a0', '\u2003', '\ufeff'])('keep %j at the ends of a value', (blank) => {
    const definition = { ...DEFINITION, description: `${blank}the disk${blank}` };
    expect(parseExportFile(formatExportFile(definition))).toEqual(definition);
  });

  test('are read back, and replaced where they are', async () => {
    const directory = await mkdtemp(path.join(os.tmpdir(), 'hf-exports-'));
    try {
      const { name } = DEFINITION;
      expect(await readExportFile(directory, name)).toBeNull();
      await expect(replaceExportFile(directory, DEFINITION)).rejects.toMatchObject({ code: 'NOT_FOUND' });
      expect(await readdir(directory)).toEqual([]);
      const { digest } = await createExportFile(directory, DEFINITION);
      expect(await readExportFile(directory, name)).toEqual(DEFINITION);
      const replaced = await replaceExportFile(directory, { ...DEFINITION, description: 'other' });
      expect(replaced.digest).not.toBe(digest);
      expect((await readExportFile(directory, name))?.description).toBe('other');
      expect(await readdir(directory)).toEqual([replaced.file]);
      await writeFile(path.join(directory, 'broken.conf'), '[broken');
      await mkdir(path.join(directory, 'directory.conf'));
      expect(await readExportFile(directory, 'broken')).toBeNull();
      expect(await readExportFile(directory, 'directory')).toBeNull();
    } finally {
      await rm(directory, { recursive: true });
    }
  });
});
