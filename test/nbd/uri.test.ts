import { describe, expect, it } from 'vitest';
import { exportAt, parseNbdUri } from '../../src/nbd/uri.js';

describe('parseNbdUri', () => {
  it.each([
    ['nbd://host', 'nbd:tcp:host:10809#', '', false],
    ['nbd://host:10810/vda', 'nbd:tcp:host:10810#vda', 'vda', false],
    ['nbds://alice@host/vda', 'nbd:tcp:host:10809#vda', 'vda', true],
    ['nbd://[::1]/a%20b', 'nbd:tcp:[::1]:10809#a b', 'a b', false],
    ['nbd+unix:///disk?socket=/run/n.sock', 'nbd:unix:/run/n.sock#disk', 'disk', false],
    ['nbds+unix:///?socket=%2Frun%2Fn.sock', 'nbd:unix:/run/n.sock#', '', true],
  ])('reads %s', (text, identity, exportName, isTls) => {
    expect(parseNbdUri(text)).toEqual({ text, identity, exportName, isTls });
  });

  it('gives one disk one identity, whoever connects and whether over TLS or not', () => {
    expect(parseNbdUri('nbds://bob@host/x').identity).toBe(parseNbdUri('nbd://host:10809/x').identity);
  });

  it.each([
    [''],
    ['/dev/sda'],
    ['http://host/x'],
    ['nbd://'],
    ['nbd+unix:///x'],
    ['nbd+unix:///x?socket=relative'],
    ['nbd+unix://host/x?socket=/s'],
    ['nbd://host/x?socket=/s'],
    ['nbd://host/x?tls-psk-file=/etc/passwd'],
    ['nbds://alice:secret@host/x'],
    ['nbd://host/%zz'],
    ['nbd://host/a%00b'],
    ['nbd://host/a b'],
    ['nbd://host/a\u0000b'],
    ['nbd://host\nhost2/'],
    ['nbd://host:99999/x'],
    [`nbd://host/${'x'.repeat(1_000_000)}`],
  ])('refuses %j', (text) => {
    expect(() => parseNbdUri(text)).toThrow(expect.objectContaining({ code: 'NBD_URI_INVALID' }) as Error);
  });

  it('never repeats the text of a URI in the error: it may hold a secret', () => {
    expect(() => parseNbdUri('nbds://alice:secret@host/x')).toThrow(/^((?!secret).)*$/s);
  });
});

describe('exportAt', () => {
  it.each([
    ['nbd://127.0.0.1:20809', 'nbd://127.0.0.1:20809/a'],
    ['nbds://agent7@backup.example.org/', 'nbds://agent7@backup.example.org/a'],
    ['nbd+unix:///?socket=/run/n.sock', 'nbd+unix:///a?socket=/run/n.sock'],
  ])('finds an export behind %s', (address, expected) => {
    expect(exportAt(address, 'a')).toBe(expected);
  });

  it('keeps any name apart from the address', () => {
    const uri = exportAt('nbd+unix:///?socket=/run/n.sock', 'a/b?socket=x c%');
    expect(parseNbdUri(uri)).toMatchObject({ exportName: 'a/b?socket=x c%' });
    expect(parseNbdUri(uri).identity).toContain('unix:/run/n.sock#');
  });

  it.each(['nbd://host/other', 'http://host', 'host:10809', 'nbd+unix:///'])('refuses %s', (address) => {
    expect(() => exportAt(address, 'a')).toThrow(
      expect.objectContaining({ code: 'NBD_URI_INVALID' }) as Error,
    );
  });
});
