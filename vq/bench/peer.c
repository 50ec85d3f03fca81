/*
 * The bench's yardstick: a vhost-user network backend in C that does what
 * `vq serve net --link tap:NAME` does, with one system call a frame.
 *
 *     peer SOCKET TAP [QUEUE-PAIRS]
 *     peer SOCKET loopback
 *
 * It listens on SOCKET, serves the first frontend that comes (User-Mode Linux, DPDK's virtio-user,
 * QEMU) and ends when that has gone. Frames go by writev and readv between guest memory and the
 * tap, net header and all, without a copy; or a pair of sockets that gives them back. used.idx is stored once for a burst, and the driver is
 * called at most once for it. One thread serves all queues.
 *
 * It is as fast as that way of working goes, so it leaves out what vq does beside: no locked MAC,
 * no capture, no control queue, no inflight region, no dirty log, no frame that waits for room in
 * private memory, no checksum in software; and a driver or frontend that breaks a rule ends it.
 * For Linux on a little-endian processor.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if_tun.h>
#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

enum {
    MAX_PAIRS = 8,
    MAX_REGIONS = 8,
    MAX_QUEUE_SIZE = 1024,
    WINDOW = 2048,          /* receive buffers, and their pieces, parsed ahead */
    BURST = 64,             /* frames read from the tap in a turn */
    BURSTS_PER_TURN = 4,    /* what the driver has made available by then, each */
    LARGEST_FRAME = 65550,  /* 64 KiB of IP packet less a byte, Ethernet and one VLAN tag */
    ETHERNET = 14 + 2 * 4,
};

#define BIT(n) (UINT64_C(1) << (n))
#define PROTOCOL_FEATURES 30 /* vhost-user's own bit */

static const uint64_t OFFERED =
    BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_MAC) |
    BIT(VIRTIO_NET_F_GUEST_TSO4) | BIT(VIRTIO_NET_F_GUEST_TSO6) | BIT(VIRTIO_NET_F_HOST_TSO4) |
    BIT(VIRTIO_NET_F_HOST_TSO6) | BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_RING_F_INDIRECT_DESC) |
    BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(PROTOCOL_FEATURES) | BIT(VIRTIO_F_VERSION_1);

enum { P_MQ = 0, P_REPLY_ACK = 3, P_BACKEND_REQ = 5, P_CONFIG = 9 };

static const uint64_t OFFERED_PROTOCOL =
    BIT(P_MQ) | BIT(P_REPLY_ACK) | BIT(P_BACKEND_REQ) | BIT(P_CONFIG);

enum request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
};

enum { F_VERSION = 1, F_REPLY = 4, F_NEED_REPLY = 8, NO_FD = 0x100 };

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t number;
        struct { uint32_t index, value; } state;
        struct { uint32_t index, flags; uint64_t desc, used, avail, log; } address;
        struct {
            uint32_t count, padding;
            struct { uint64_t gpa, size, uva, offset; } region[MAX_REGIONS];
        } memory;
        struct { uint32_t offset, size, flags; uint8_t data[256]; } config;
        uint8_t bytes[512];
    } body;
    int fds[MAX_REGIONS];
    unsigned fd_count;
} __attribute__((packed)); /* the body follows 12 bytes */

struct region {
    uint64_t gpa, size, uva;
    uint8_t *host; /* where gpa is here */
    void *map;
    size_t map_size;
};

struct buffer { /* a chain of receive buffers */
    uint16_t head, pieces;
    uint32_t size;
};

struct queue {
    unsigned index;
    uint16_t size;
    bool enabled;
    int kick, call, tap;
    uint64_t desc_uva, avail_uva, used_uva;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t next_avail;   /* the next available entry to take */
    uint16_t seen_avail;   /* avail->idx when it was last looked at */
    uint16_t next_used;    /* where the next used element goes */
    uint16_t published;    /* used->idx as the driver knows it */
    bool busy;             /* more is to be done at once */
    bool reading;          /* receive: whether the tap is watched */

    /* receive: buffers taken and not used yet, [first, end) of both arrays */
    struct buffer buffer[WINDOW];
    struct iovec piece[WINDOW];
    unsigned first_buffer, end_buffer, first_piece, end_piece;
    size_t room;
};

static struct queue queues[2 * MAX_PAIRS];
static unsigned queue_count = 2;
static struct region regions[MAX_REGIONS];
static unsigned region_count;
static uint64_t features;
static size_t header_size = sizeof(struct virtio_net_hdr_v1);
static size_t wanted_room; /* bytes that the largest frame to come takes, header included */
static char tap_name[IFNAMSIZ];
static bool loopback;
static int frontend, poller, backend_channel = -1;

static __attribute__((noreturn)) void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("peer: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static bool has(unsigned feature) {
    return features >> feature & 1;
}

static bool is_receive(const struct queue *q) {
    return q->index % 2 == 0;
}

/* --- guest memory ------------------------------------------------------------------------------ */

static void *at_gpa(uint64_t gpa, uint64_t size) {
    for (unsigned i = 0; i < region_count; i++) {
        const struct region *r = &regions[i];
        if (gpa >= r->gpa && gpa - r->gpa < r->size && size <= r->size - (gpa - r->gpa))
            return r->host + (gpa - r->gpa);
    }
    return NULL;
}

static void *at_uva(uint64_t uva, uint64_t size) {
    for (unsigned i = 0; i < region_count; i++) {
        const struct region *r = &regions[i];
        if (uva >= r->uva && uva - r->uva < r->size && size <= r->size - (uva - r->uva))
            return r->host + (uva - r->uva);
    }
    return NULL;
}

static void unmap_all(void) {
    while (region_count) {
        const struct region *r = &regions[--region_count];
        munmap(r->map, r->map_size);
    }
}

static void set_memory(const struct message *m) {
    unmap_all();
    if (m->body.memory.count > MAX_REGIONS || m->body.memory.count != m->fd_count)
        fail("%u regions with %u descriptors", m->body.memory.count, m->fd_count);
    for (unsigned i = 0; i < m->fd_count; i++) {
        struct region *r = &regions[i];
        uint64_t offset = m->body.memory.region[i].offset;
        struct stat file;
        r->gpa = m->body.memory.region[i].gpa;
        r->size = m->body.memory.region[i].size;
        r->uva = m->body.memory.region[i].uva;
        r->map_size = r->size + offset;
        if (fstat(m->fds[i], &file) || (uint64_t)file.st_size < r->map_size)
            fail("a region is larger than its file");
        r->map = mmap(NULL, r->map_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->fds[i], 0);
        if (r->map == MAP_FAILED)
            fail("mmap: %s", strerror(errno));
        r->host = (uint8_t *)r->map + offset;
        region_count++;
        close(m->fds[i]);
    }
}

/* --- rings ------------------------------------------------------------------------------------- */

static bool running(const struct queue *q) {
    return q->desc && q->kick >= 0 && q->enabled;
}

static uint16_t *used_event(const struct queue *q) {
    return &q->avail->ring[q->size];
}

static uint16_t *avail_event(const struct queue *q) {
    return (uint16_t *)&q->used->ring[q->size];
}

/* Whether there is a chain to take; looks at the index only when those known of are taken. */
static bool available(struct queue *q) {
    if (q->next_avail == q->seen_avail)
        q->seen_avail = __atomic_load_n(&q->avail->idx, __ATOMIC_ACQUIRE);
    uint16_t waiting = q->seen_avail - q->next_avail;
    if (waiting > q->size)
        fail("queue %u: %u chains are available at once", q->index, waiting);
    return waiting;
}

static uint16_t take_head(struct queue *q) {
    return q->avail->ring[q->next_avail++ & (q->size - 1)];
}

/* The pieces of a chain, all of them device-writable or all readable; 0 for a bad chain. */
static unsigned walk(struct queue *q, uint16_t head, struct iovec *piece, unsigned limit,
                     bool writable) {
    const volatile struct vring_desc *table = q->desc;
    unsigned entries = q->size, left = q->size, count = 0;
    uint16_t index = head;

    while (index < entries && left--) {
        struct vring_desc d = {table[index].addr, table[index].len, table[index].flags,
                               table[index].next};
        void *host = at_gpa(d.addr, d.len);
        if (!host)
            return 0;
        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (table != q->desc || d.flags & VRING_DESC_F_NEXT || d.len % sizeof(d))
                return 0;
            table = host;
            entries = d.len / sizeof(d);
            index = 0;
            left = q->size;
            continue;
        }
        if (!(d.flags & VRING_DESC_F_WRITE) == writable || count == limit)
            return 0;
        piece[count].iov_base = host;
        piece[count++].iov_len = d.len;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return count;
        index = d.next;
    }
    return 0;
}

static void use(struct queue *q, uint16_t head, uint32_t written) {
    struct vring_used_elem *element = &q->used->ring[q->next_used++ & (q->size - 1)];
    element->id = head;
    element->len = written;
}

/* One store of used.idx for all that was used, and one call if the driver wants it. */
static void publish(struct queue *q) {
    static const uint64_t one = 1;
    bool wanted;

    if (q->published == q->next_used)
        return;
    uint16_t before = q->published;
    __atomic_store_n(&q->used->idx, q->next_used, __ATOMIC_RELEASE);
    q->published = q->next_used;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the driver stores its wish, then looks at idx */
    if (has(VIRTIO_RING_F_EVENT_IDX))
        wanted = vring_need_event(__atomic_load_n(used_event(q), __ATOMIC_RELAXED), q->next_used,
                                  before);
    else
        wanted = !(__atomic_load_n(&q->avail->flags, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
    if (wanted && q->call >= 0 && write(q->call, &one, sizeof(one)) < 0 && errno != EAGAIN)
        fail("call: %s", strerror(errno));
}

static void disable_kicks(struct queue *q) {
    /* With EVENT_IDX an avail_event that lies behind is as good. */
    if (!has(VIRTIO_RING_F_EVENT_IDX))
        __atomic_store_n(&q->used->flags, VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
}

/* Asks for a kick; whether something came in before that, for which there will be none. */
static bool enable_kicks(struct queue *q) {
    if (has(VIRTIO_RING_F_EVENT_IDX))
        __atomic_store_n(avail_event(q), q->next_avail, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&q->used->flags, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the driver stores idx, then looks at our wish */
    return available(q);
}

/* --- frames from the guest --------------------------------------------------------------------- */

static void transmit(struct queue *q) {
    struct iovec piece[MAX_QUEUE_SIZE];

    disable_kicks(q);
    for (int burst = 0; burst < BURSTS_PER_TURN; burst++) {
        if (!available(q) && !enable_kicks(q)) {
            q->busy = false;
            return;
        }
        while (q->next_avail != q->seen_avail) {
            uint16_t head = take_head(q);
            unsigned count = walk(q, head, piece, LENGTH(piece), false);
            if (!count)
                fail("queue %u: a bad chain", q->index);
            /* A frame that the tap refuses is dropped, as a full wire would. */
            if (writev(q->tap, piece, count) < 0 && errno != EINVAL && errno != ENOBUFS &&
                errno != ENOMEM && errno != EIO && errno != EAGAIN)
                fail("tap: %s", strerror(errno));
            use(q, head, 0);
        }
        publish(q);
    }
    q->busy = true;
}

/* --- frames for the guest ---------------------------------------------------------------------- */

static void watch_tap(struct queue *q, bool reading) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = q->index | 1u << 16};

    if (q->reading == reading)
        return;
    q->reading = reading;
    if (epoll_ctl(poller, reading ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, q->tap, &event))
        fail("epoll: %s", strerror(errno));
}

/* Makes room at the end of the window by moving what is in it to the front. */
static void compact(struct queue *q) {
    unsigned n = q->end_buffer - q->first_buffer;
    memmove(q->buffer, q->buffer + q->first_buffer, n * sizeof(q->buffer[0]));
    q->first_buffer = 0;
    q->end_buffer = n;
    n = q->end_piece - q->first_piece;
    memmove(q->piece, q->piece + q->first_piece, n * sizeof(q->piece[0]));
    q->first_piece = 0;
    q->end_piece = n;
}

/* Takes buffers until the largest frame fits; whether it does. */
static bool refill(struct queue *q) {
    if (q->end_buffer > WINDOW / 2 || q->end_piece > WINDOW / 2)
        compact(q);
    while (q->room < wanted_room && available(q)) {
        struct buffer *b = &q->buffer[q->end_buffer];
        if (q->end_buffer == WINDOW)
            return true; /* tiny buffers: as many as can be */
        b->head = take_head(q);
        b->pieces = walk(q, b->head, &q->piece[q->end_piece], WINDOW - q->end_piece, true);
        b->size = 0;
        for (unsigned i = 0; i < b->pieces; i++)
            b->size += q->piece[q->end_piece + i].iov_len;
        if (!b->pieces || q->piece[q->end_piece].iov_len < header_size)
            fail("queue %u: a bad receive buffer", q->index);
        q->end_buffer++;
        q->end_piece += b->pieces;
        q->room += b->size;
    }
    /* Without mergeable buffers a frame has one chain, however much room that has. */
    return q->room >= wanted_room || (!has(VIRTIO_NET_F_MRG_RXBUF) && q->room);
}

static void put_back(struct queue *q) {
    q->next_avail -= q->end_buffer - q->first_buffer;
    q->seen_avail = q->next_avail;
    q->first_buffer = q->end_buffer = q->first_piece = q->end_piece = 0;
    q->room = 0;
}

/* Gives the buffers that a frame of `size` bytes stands in to the driver. */
static void use_window(struct queue *q, size_t size) {
    struct virtio_net_hdr_v1 *header = q->piece[q->first_piece].iov_base;
    uint16_t used = 0;

    do {
        struct buffer *b = &q->buffer[q->first_buffer++];
        uint32_t written = size < b->size ? size : b->size;
        use(q, b->head, written);
        size -= written;
        q->first_piece += b->pieces;
        q->room -= b->size;
        used++;
    } while (size);
    if (header_size == sizeof(*header))
        header->num_buffers = used;
}

static void receive(struct queue *q) {
    disable_kicks(q);
    for (int frame = 0; frame < BURST; frame++) {
        while (!refill(q)) {
            publish(q);
            if (!enable_kicks(q)) {
                watch_tap(q, false); /* until the driver makes buffers available */
                return;
            }
        }
        unsigned count = has(VIRTIO_NET_F_MRG_RXBUF) ? q->end_piece - q->first_piece
                                                     : q->buffer[q->first_buffer].pieces;
        ssize_t size = readv(q->tap, q->piece + q->first_piece, count < IOV_MAX ? count : IOV_MAX);
        if (size < 0) {
            if (errno != EAGAIN && errno != EIO)
                fail("tap: %s", strerror(errno));
            break;
        }
        use_window(q, size);
    }
    publish(q);
    watch_tap(q, true);
}

/* --- the tap ----------------------------------------------------------------------------------- */

static void open_tap(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};

    if (queue_count > 2)
        request.ifr_flags |= IFF_MULTI_QUEUE;
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    for (unsigned i = 0; i < queue_count; i += 2) {
        int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0 || ioctl(fd, TUNSETIFF, &request))
            fail("tap %s: %s", name, strerror(errno));
        queues[i].tap = queues[i + 1].tap = fd;
    }
    memcpy(tap_name, request.ifr_name, IFNAMSIZ);
}

/* Instead of a tap: what is written to one end comes out of the other. */
static void open_loopback(void) {
    int ends[2], space = 8 << 20;

    if (queue_count > 2 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends))
        fail("loopback: %s", strerror(errno));
    if (setsockopt(ends[1], SOL_SOCKET, SO_SNDBUFFORCE, &space, sizeof(space)))
        setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &space, sizeof(space)); /* as far as allowed */
    queues[0].tap = ends[0];
    queues[1].tap = ends[1];
}

/* What was negotiated decides what the tap leaves undone, and how large its frames may be. */
static void set_up_tap(void) {
    unsigned offloads = 0;
    struct ifreq request = {0};
    bool long_header = has(VIRTIO_F_VERSION_1) || has(VIRTIO_NET_F_MRG_RXBUF);
    int size = long_header ? sizeof(struct virtio_net_hdr_v1) : sizeof(struct virtio_net_hdr);

    if (loopback) {
        header_size = size;
        wanted_room = header_size + LARGEST_FRAME;
        return;
    }
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (has(VIRTIO_NET_F_GUEST_CSUM)) {
        offloads = TUN_F_CSUM;
        offloads |= has(VIRTIO_NET_F_GUEST_TSO4) ? TUN_F_TSO4 : 0;
        offloads |= has(VIRTIO_NET_F_GUEST_TSO6) ? TUN_F_TSO6 : 0;
    }
    memcpy(request.ifr_name, tap_name, IFNAMSIZ);
    if (control < 0 || ioctl(control, SIOCGIFMTU, &request))
        fail("the MTU of %s: %s", tap_name, strerror(errno));
    close(control);
    header_size = size;
    wanted_room = header_size + (offloads & ~TUN_F_CSUM ? LARGEST_FRAME
                                                        : (size_t)request.ifr_mtu + ETHERNET);
    for (unsigned i = 0; i < queue_count; i += 2)
        if (ioctl(queues[i].tap, TUNSETVNETHDRSZ, &size))
            fail("the header of %s: %s", tap_name, strerror(errno));
    if (ioctl(queues[0].tap, TUNSETOFFLOAD, offloads))
        fail("the offloads of %s: %s", tap_name, strerror(errno));
}

/* A pair that the driver does not use must not get its share of the frames. */
static void attach(struct queue *q, bool wanted) {
    struct ifreq request = {.ifr_flags = wanted ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE};

    if (queue_count > 2 && is_receive(q) && q->enabled != wanted)
        ioctl(q->tap, TUNSETQUEUE, &request); /* EINVAL: it is that way already */
}

/* --- the frontend's messages ------------------------------------------------------------------- */

static void find_rings(struct queue *q) {
    q->desc = at_uva(q->desc_uva, q->size * sizeof(struct vring_desc));
    q->avail = at_uva(q->avail_uva, 6 + 2 * (uint64_t)q->size);
    q->used = at_uva(q->used_uva, 6 + 8 * (uint64_t)q->size);
    if (!q->desc || !q->avail || !q->used)
        q->desc = NULL;
}

static void start(struct queue *q) {
    if (!running(q))
        return;
    q->seen_avail = q->next_avail;
    q->next_used = q->published = __atomic_load_n(&q->used->idx, __ATOMIC_RELAXED);
    if (is_receive(q))
        receive(q);
    else
        q->busy = true;
}

static void stop(struct queue *q) {
    if (is_receive(q) && q->desc) {
        watch_tap(q, false);
        put_back(q);
    }
    q->busy = false;
}

static void set_kick(struct queue *q, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = q->index | 2u << 16};

    if (q->kick >= 0)
        close(q->kick);
    q->kick = fd;
    if (fd < 0)
        return;
    if (fcntl(fd, F_SETFL, O_NONBLOCK) || epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
        fail("a kick descriptor: %s", strerror(errno));
}

static void set_call(struct queue *q, int fd) {
    if (q->call >= 0)
        close(q->call);
    q->call = fd;
    if (fd >= 0)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static void reply(struct message *m, uint32_t size) {
    m->flags = F_VERSION | F_REPLY;
    m->size = size;
    if (send(frontend, m, offsetof(struct message, body) + size, MSG_NOSIGNAL) < 0)
        fail("reply: %s", strerror(errno));
}

static void reply_number(struct message *m, uint64_t number) {
    m->body.number = number;
    reply(m, sizeof(number));
}

static struct queue *queue_of(uint32_t index) {
    if (index >= queue_count)
        fail("there is no queue %u", index);
    return &queues[index];
}

static void get_config(struct message *m) {
    struct virtio_net_config config = {.mac = {0xfe, 0xe1, 0xba, 0xd1, 0xba, 0xd2},
                                       .max_virtqueue_pairs = queue_count / 2};
    uint32_t offset = m->body.config.offset, size = m->body.config.size;

    if (size > sizeof(m->body.config.data))
        fail("%u bytes of config", size);
    memset(m->body.config.data, 0, size);
    if (offset < sizeof(config))
        memcpy(m->body.config.data, (uint8_t *)&config + offset,
               size < sizeof(config) - offset ? size : sizeof(config) - offset);
    reply(m, m->size);
}

/* Carries out one message; whether it has a reply of its own, which was sent. */
static bool handle(struct message *m) {
    uint32_t index = m->body.state.index;
    int fd = m->fd_count ? m->fds[0] : -1;
    struct queue *q;

    switch (m->request) {
    case GET_FEATURES:
        reply_number(m, OFFERED | (queue_count > 2 ? BIT(VIRTIO_NET_F_MQ) : 0));
        return true;
    case GET_PROTOCOL_FEATURES:
        reply_number(m, OFFERED_PROTOCOL);
        return true;
    case GET_QUEUE_NUM:
        reply_number(m, queue_count / 2);
        return true;
    case GET_CONFIG:
        get_config(m);
        return true;
    case GET_VRING_BASE:
        q = queue_of(index);
        stop(q);
        set_kick(q, -1);
        set_call(q, -1);
        m->body.state.value = q->next_avail;
        reply(m, sizeof(m->body.state));
        return true;
    case SET_FEATURES:
        features = m->body.number;
        for (unsigned i = 0; i < queue_count && !has(PROTOCOL_FEATURES); i++)
            queues[i].enabled = true;
        set_up_tap();
        break;
    case SET_MEM_TABLE:
        for (unsigned i = 0; i < queue_count; i++)
            stop(&queues[i]);
        set_memory(m);
        for (unsigned i = 0; i < queue_count; i++) {
            find_rings(&queues[i]);
            start(&queues[i]);
        }
        break;
    case SET_VRING_NUM:
        if (!m->body.state.value || m->body.state.value > MAX_QUEUE_SIZE ||
            m->body.state.value & (m->body.state.value - 1))
            fail("a queue of %u", m->body.state.value);
        queue_of(index)->size = m->body.state.value;
        break;
    case SET_VRING_BASE:
        queue_of(index)->next_avail = m->body.state.value;
        break;
    case SET_VRING_ADDR:
        q = queue_of(index);
        stop(q);
        q->desc_uva = m->body.address.desc;
        q->avail_uva = m->body.address.avail;
        q->used_uva = m->body.address.used;
        find_rings(q);
        start(q);
        break;
    case SET_VRING_KICK:
        q = queue_of(m->body.number & 0xff);
        set_kick(q, m->body.number & NO_FD ? -1 : fd);
        start(q);
        break;
    case SET_VRING_CALL:
        set_call(queue_of(m->body.number & 0xff), m->body.number & NO_FD ? -1 : fd);
        break;
    case SET_VRING_ENABLE:
        q = queue_of(index);
        attach(q, m->body.state.value);
        if (!m->body.state.value)
            stop(q);
        q->enabled = m->body.state.value;
        start(q);
        break;
    case SET_BACKEND_REQ_FD:
        if (backend_channel >= 0)
            close(backend_channel);
        backend_channel = fd; /* kept: a frontend takes its end for the device's */
        break;
    case SET_VRING_ERR:
        if (fd >= 0)
            close(fd);
        break;
    case SET_OWNER:
    case RESET_OWNER:
    case SET_PROTOCOL_FEATURES:
    case SET_CONFIG:
        break;
    default:
        fail("request %u is unknown", m->request);
    }
    return false;
}

/* Reads and carries out one message; false when the frontend has gone. */
static bool serve_frontend(void) {
    static struct message m;
    union {
        struct cmsghdr header;
        uint8_t space[CMSG_SPACE(sizeof(m.fds))];
    } control;
    struct iovec head = {&m, offsetof(struct message, body)};
    struct msghdr message = {.msg_iov = &head, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(frontend, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC);

    if (got <= 0)
        return false;
    m.fd_count = 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
        m.fd_count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(m.fds, CMSG_DATA(c), m.fd_count * sizeof(int));
    }
    if ((size_t)got < head.iov_len || m.size > sizeof(m.body) ||
        (m.size && recv(frontend, &m.body, m.size, MSG_WAITALL) != (ssize_t)m.size))
        fail("message %u of %u bytes was cut short, or is too long", m.request, m.size);
    bool need_reply = m.flags & F_NEED_REPLY;
    if (!handle(&m) && need_reply)
        reply_number(&m, 0);
    return true;
}

/* --- the main loop ----------------------------------------------------------------------------- */

static void wait_for_frontend(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof(address.sun_path))
        fail("%s is too long for a socket's path", path);
    strcpy(address.sun_path, path);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) ||
        listen(listener, 1))
        fail("%s: %s", path, strerror(errno));
    frontend = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (frontend < 0)
        fail("accept: %s", strerror(errno));
    close(listener);
    unlink(path);
}

static void kicked(struct queue *q) {
    uint64_t count;

    if (read(q->kick, &count, sizeof(count)) < 0 || !running(q))
        return;
    if (is_receive(q))
        receive(q);
    else
        q->busy = true;
}

int main(int argc, char **argv) {
    struct epoll_event events[4 * MAX_PAIRS + 1];
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = 0};

    if (argc == 4)
        queue_count = 2 * atoi(argv[3]);
    if (argc < 3 || argc > 4 || queue_count < 2 || queue_count > 2 * MAX_PAIRS)
        fail("usage: peer SOCKET TAP [QUEUE-PAIRS]");
    for (unsigned i = 0; i < queue_count; i++) {
        queues[i].index = i;
        queues[i].kick = queues[i].call = -1;
        queues[i].size = 256;
    }
    loopback = !strcmp(argv[2], "loopback");
    if (loopback)
        open_loopback();
    else
        open_tap(argv[2]);
    wait_for_frontend(argv[1]);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, frontend, &event))
        fail("epoll: %s", strerror(errno));
    for (bool busy = false;;) {
        int ready = epoll_wait(poller, events, LENGTH(events), busy ? 0 : -1);
        if (ready < 0 && errno != EINTR)
            fail("epoll: %s", strerror(errno));
        for (int i = 0; i < ready; i++) {
            struct queue *q = &queues[events[i].data.u32 & 0xffff];
            switch (events[i].data.u32 >> 16) {
            case 0:
                if (!serve_frontend())
                    return 0;
                break;
            case 1:
                if (q->reading)
                    receive(q);
                break;
            default:
                if (q->kick >= 0)
                    kicked(q);
            }
        }
        busy = false;
        for (unsigned i = 1; i < queue_count; i += 2) {
            if (!running(&queues[i]))
                queues[i].busy = false;
            if (queues[i].busy)
                transmit(&queues[i]);
            busy |= queues[i].busy;
        }
    }
}
